"""A safetensors file that grows tensor by tensor.

All names, dtypes and shapes are known before the first value is computed, so the header is written
first and every tensor has its place. Tensors are laid out by decreasing element size, as the
format's own writer does: consumers view the file's bytes in place and need them aligned.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from loftq_cli.checkpoint.dtypes import BITS, tag_of
from loftq_cli.checkpoint.header import StoredTensor, TensorSpec
from loftq_cli.checkpoint.reader import TensorFile, pieces_of
from loftq_cli.machine.durable import explained, sync_directory, write_all

_METADATA = {"format": "pt"}  # one key only: the library's order of several is random


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """The spec of a tensor that is to be written."""
    return TensorSpec(name, tag_of(tensor.dtype), tuple(tensor.shape))


def place(
    specs: Sequence[TensorSpec],
    metadata: Mapping[str, str] = _METADATA,
    room: int = 0,
    *,
    as_given: bool = False,
) -> tuple[bytes, dict[str, StoredTensor]]:
    """(length field and header, place of every tensor) of a file that holds ``specs``, the widest
    dtypes first, or ``as_given``. The two take ``room`` bytes, if they need no more."""
    ordered = list(specs) if as_given else sorted(specs, key=lambda spec: -BITS[spec.dtype])
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for spec in ordered:
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw = raw.ljust(max(len(raw), room - 8))
    raw += b" " * (-len(raw) % 8)
    header = len(raw).to_bytes(8, "little") + raw
    placed = {}
    position = len(header)
    for spec in ordered:
        placed[spec.name] = StoredTensor(spec.name, spec.dtype, spec.shape, position)
        position += spec.nbytes
    return header, placed


def index_of(files: Iterable[tuple[str, Iterable[TensorSpec]]]) -> dict[str, Any]:
    """The content of model.safetensors.index.json: which of several files holds which tensor."""
    held = [(spec, name) for name, specs in files for spec in specs]
    return {
        "metadata": {"total_size": sum(spec.nbytes for spec, _ in held)},
        "weight_map": {spec.name: name for spec, name in held},
    }


class GrowingShard:
    """An output shard. Opening an existing file keeps what is in it, for a resumed conversion."""

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        self.path = path
        header, self._placed = place(specs)
        size = len(header) + sum(spec.nbytes for spec in specs)
        with explained(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                os.ftruncate(self._file, size)
                write_all(self._file, header, 0)
                sync_directory(path.parent)  # or the file may vanish with all that is synced in it
            except BaseException:
                os.close(self._file)
                raise

    def __enter__(self) -> GrowingShard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)

    def write(self, name: str, tensor: torch.Tensor) -> str:
        """Write a whole tensor; its sha256."""
        place = self._placed[name]
        assert spec_of(name, tensor) == TensorSpec(place.name, place.dtype, place.shape)
        return self.write_pieces(name, pieces_of(tensor))

    def write_pieces(self, name: str, pieces: Iterable[bytes | bytearray | memoryview]) -> str:
        """Write a tensor's bytes in order; their sha256."""
        writer = self.tensor(name)
        for piece in pieces:
            writer.append(piece)
        return writer.sha256

    def tensor(self, name: str) -> TensorWriter:
        """Writes the tensor ``name`` piece by piece."""
        return TensorWriter(self.path, self._file, self._placed[name].start)

    def sync(self) -> None:
        """Make everything written so far durable."""
        with explained(self.path):
            os.fsync(self._file)

    def sha256_of(self, name: str) -> str:
        """sha256 of a tensor's bytes as they are in the file now."""
        digest = hashlib.sha256()
        with TensorFile(self.path) as file:
            for piece in file.pieces(self._placed[name]):
                digest.update(piece)
        return digest.hexdigest()


class TensorWriter:
    """Bytes of one tensor, appended in order at its place in an open file."""

    def __init__(self, path: Path, file: int, position: int) -> None:
        self._path = path
        self._file = file
        self._position = position
        self._digest = hashlib.sha256()

    def append(self, piece: bytes | bytearray | memoryview) -> None:
        view = memoryview(piece)
        with explained(self._path):
            write_all(self._file, view, self._position)
        self._digest.update(view)
        self._position += view.nbytes

    @property
    def sha256(self) -> str:
        """Of all bytes appended so far."""
        return self._digest.hexdigest()
