"""What a trained adapter holds for a weight: pairs A, B, of single experts too, and rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.checkpoint.reader import TensorFile


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


@dataclass(frozen=True)
class FusedPair:
    """A and B of all experts of a layer, of ``rank`` each."""

    lora_A: StoredTensor
    lora_B: StoredTensor
    scaling: float
    rank: int

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
        return Pair(self.lora_A, self.lora_B, self.scaling, slice=found)


@dataclass(frozen=True)
class Pair:
    """A (rank, in) and B (out, rank) in the adapter's file, and the factor of their product; of an
    ``embedding`` (num, dim), which gets (B A)^T, A (rank, num) and B (dim, rank)."""

    lora_A: StoredTensor
    lora_B: StoredTensor
    scaling: float
    embedding: bool = False
    slice: Slice | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of what is added, (out, in) or (num, dim)."""
        rows, columns = self.lora_B.shape[0], self.lora_A.shape[1]
        if self.slice is not None:
            return self.slice.rows, columns
        return (columns, rows) if self.embedding else (rows, columns)

    def read(self, file: TensorFile) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, float32, from the adapter's ``file``."""
        lora_A, lora_B = file.read(self.lora_A).float(), file.read(self.lora_B).float()
        return (lora_A, lora_B) if self.slice is None else self.slice.of(lora_A, lora_B)


@dataclass(frozen=True)
class TokenRows:
    """Rows (tokens, dim) that take the place of those of an embedding, and their numbers."""

    indices: Sequence[int]
    values: StoredTensor
