"""What is read of a shard: matrices whole, other tensors in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.checkpoint.journal import Apart
from loftq_cli.checkpoint.reader import ShardReader


@dataclass
class Item:
    """A tensor of the source as it was read: a ``weight`` to convert, with the Q that is ``given``
    for it, a ``piece`` to copy, or nothing if it was ``finished`` before, or if nothing becomes of
    it. ``prefix_sha256``: of the shard up to the tensor's end, on its last item, unless it was read
    ``apart``."""

    tensor: StoredTensor
    prefix_sha256: str | None
    weight: torch.Tensor | None = None
    given: torch.Tensor | None = None
    piece: bytearray | None = None
    finished: bool = False
    apart: Apart | None = None

    @property
    def elements(self) -> int:
        return 0 if self.weight is None else self.weight.numel()


def copied(reader: ShardReader, tensor: StoredTensor) -> Iterator[Item]:
    """A tensor that is passed through, in pieces."""
    pieces = reader.pieces(tensor)
    piece = next(pieces, bytearray())
    for following in pieces:
        yield Item(tensor, None, piece=piece)
        piece = following
    yield Item(tensor, reader.sha256, piece=piece)
