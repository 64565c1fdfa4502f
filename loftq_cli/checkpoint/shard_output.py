"""What becomes of one source shard: its tensors written, made durable, then journaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from loftq_cli.checkpoint.header import StoredTensor, TensorSpec
from loftq_cli.checkpoint.journal import Apart, Journal, Unit
from loftq_cli.checkpoint.writer import GrowingShard, TensorWriter

_UNSYNCED_LIMIT = 64 << 20  # bytes of passed-through tensors between two journal entries


@dataclass
class ShardOutput:
    """The files that one source shard's tensors go to: {name in the output: file}.

    ``backbone`` is the name of the shard itself. Used from one thread at a time.
    """

    journal: Journal
    files: Mapping[str, GrowingShard]
    backbone: str
    _pending: list[Unit] = field(default_factory=list)
    _unsynced: int = 0
    _copying: TensorWriter | None = None

    def finished(self, tensor: str) -> Unit | None:
        """The journal's unit of ``tensor``, if its bytes on disk are those that it recorded."""
        unit = self.journal.units.get(tensor)
        if unit is not None and all(
            self.files[file].sha256_of(name) == digest
            for file, digests in unit.outputs.items()
            for name, digest in digests.items()
        ):
            return unit
        return None

    def copy(self, name: str, piece: bytearray) -> None:
        """The next piece of a tensor that is passed through."""
        if self._copying is None:
            self._copying = self.files[self.backbone].tensor(name)
        self._copying.append(piece)

    def end_copy(self, tensor: StoredTensor | TensorSpec, prefix_sha256: str) -> None:
        """All pieces of ``tensor`` were copied."""
        assert self._copying is not None
        outputs = {self.backbone: {tensor.name: self._copying.sha256}}
        self._copying = None
        self._pending.append(Unit(tensor.name, prefix_sha256, outputs, None))
        self._unsynced += tensor.nbytes
        if self._unsynced > _UNSYNCED_LIMIT:
            self.settle()

    def leave(self, tensor: StoredTensor | TensorSpec, prefix_sha256: str) -> None:
        """Nothing becomes of ``tensor``, which was read."""
        self._pending.append(Unit(tensor.name, prefix_sha256, {}, None))

    def write(
        self,
        tensor: str,
        prefix_sha256: str | None,
        groups: Mapping[str, Mapping[str, torch.Tensor]],
        record: dict[str, object] | None,
        apart: Apart | None = None,
    ) -> None:
        """The tensors that a quantized matrix became, by file, and its manifest entry."""
        outputs = {
            file: {name: self.files[file].write(name, value) for name, value in group.items()}
            for file, group in groups.items()
        }
        self._pending.append(Unit(tensor, prefix_sha256, outputs, record, apart))
        self.settle()

    def settle(self) -> None:
        """Make everything written durable, then say so in the journal."""
        for file in self.files.values():
            file.sync()
        self.journal.add(self._pending)
        self._pending.clear()
        self._unsynced = 0
