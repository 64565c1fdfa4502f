"""What a trained adapter holds for a weight: pairs A, B, of single experts too, and rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.checkpoint.reader import TensorFile, read_tensor


@dataclass(frozen=True)
class Slice:
    """The ``rows`` from ``first`` on of the product of one ``expert`` of ``count``: PEFT stores A
    of all experts of a layer as (count * r, in), and B as (out, r * count), the expert last."""

    count: int
    expert: int
    first: int
    rows: int

    def of(self, lora_A: torch.Tensor, lora_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and B (rows, r) of this slice."""
        stacked = lora_A.view(self.count, -1, lora_A.shape[1])
        split = lora_B.view(len(lora_B), -1, self.count)
        return stacked[self.expert], split[self.first : self.first + self.rows, :, self.expert]


class Recent:
    """Tensors of an adapter's ``file``, float32: each is of many experts, which are read one after
    the other, so the last few are kept."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.read = lru_cache(maxsize=4)(self._read)

    def _read(self, tensor: StoredTensor) -> torch.Tensor:
        return read_tensor(self._file, tensor).float()


@dataclass(frozen=True)
class FusedPair:
    """A and B of all experts of a layer, of ``rank`` each, read through ``recent``."""

    lora_A: StoredTensor
    lora_B: StoredTensor
    scaling: float
    rank: int
    recent: Recent

    @property
    def count(self) -> int:
        """The experts."""
        return self.lora_A.shape[0] // self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """Of what is added for an expert, (out, in)."""
        return self.lora_B.shape[0], self.lora_A.shape[1]

    def part(self, expert: int, first: int, rows: int) -> Pair:
        """Of the ``rows`` from ``first`` on of one expert's product."""
        found = Slice(self.count, expert, first, rows)
        return Pair(self.lora_A, self.lora_B, self.scaling, slice=found, recent=self.recent)


@dataclass(frozen=True)
class Pair:
    """A (rank, in) and B (out, rank) in the adapter's file, and the factor of their product; of an
    ``embedding`` (num, dim), which gets (B A)^T, A (rank, num) and B (dim, rank)."""

    lora_A: StoredTensor
    lora_B: StoredTensor
    scaling: float
    embedding: bool = False
    slice: Slice | None = None
    recent: Recent | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of what is added, (out, in) or (num, dim)."""
        rows, columns = self.lora_B.shape[0], self.lora_A.shape[1]
        if self.slice is not None:
            return self.slice.rows, columns
        return (columns, rows) if self.embedding else (rows, columns)

    def read(self, file: TensorFile) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, float32, from the adapter's ``file``."""
        if self.slice is not None and self.recent is not None:
            return self.slice.of(self.recent.read(self.lora_A), self.recent.read(self.lora_B))
        return file.read(self.lora_A).float(), file.read(self.lora_B).float()


@dataclass(frozen=True)
class TokenRows:
    """Rows (tokens, dim) that take the place of those of an embedding, and their numbers."""

    indices: Sequence[int]
    values: StoredTensor
