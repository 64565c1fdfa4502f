"""Adapters of the experts of a layer in PEFT's own form: one pair for each fused parameter.

Of E experts with A (r, in) and B (out, r) each, A is (E * r, in) and B (out, r * E), the expert
last; the pair of the down's parameter lies around that of the first (PEFT 0.21,
``tuners/lora/layer.py``, ParamWrapper). If a parameter is made of two matrices, gate and up, their
A are stacked and their B lie on a diagonal, at twice the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.families.experts import FUSED, part_of
from loftq_cli.layouts.adapter import PREFIX, names
from loftq_cli.layouts.base import Matrix
from loftq_cli.layouts.trained_parts import Slice

_OUTER = "down_proj"


@dataclass(frozen=True)
class Member:
    """A matrix of an expert with the ``rank`` and the ``dtype`` tag of its adapter."""

    matrix: Matrix
    rank: int
    dtype: str


@dataclass(frozen=True)
class FusedAdapter:
    """The pair of one ``parameter`` of the module ``experts``, in memory: of the ``members`` of
    expert after expert, ``leaves`` for each."""

    experts: str
    parameter: str
    leaves: tuple[str, ...]
    members: Sequence[Member]

    @property
    def target(self) -> str:
        """The parameter's name, as ``target_parameters`` has it."""
        return f"{self.experts}.{self.parameter}"

    @property
    def count(self) -> int:
        """The experts."""
        return len(self.members) // len(self.leaves)

    @property
    def rank(self) -> int:
        """Of an expert's pair."""
        return sum(member.rank for member in self.members[: len(self.leaves)])

    @property
    def names(self) -> tuple[str, str]:
        """Of A and B in the adapter file."""
        path = self.experts if self.parameter == _OUTER else f"{self.experts}.base_layer"
        return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"

    def specs(self) -> list[TensorSpec]:
        """A (E * rank, in) and B (out, rank * E)."""
        name_a, name_b = self.names
        own, total = self.members[: len(self.leaves)], self.count * self.rank
        rows = sum(member.matrix.shape[0] for member in own)
        columns = own[0].matrix.shape[1]
        return [
            TensorSpec(name_a, own[0].dtype, (total, columns)),
            TensorSpec(name_b, own[0].dtype, (rows, total)),
        ]

    def place(self, number: int) -> tuple[int, int, int]:
        """Of the member of that number: its expert, and its first row and rank in that one's
        pair."""
        expert = number // len(self.leaves)
        before = self.members[expert * len(self.leaves) : number]
        rows = sum(member.matrix.shape[0] for member in before)
        return expert, rows, sum(member.rank for member in before)

    def tensors(self, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of :meth:`specs`, from those of each member, which ``read`` gives by name."""
        name_a, name_b = self.names
        rows, total = self.specs()[1].shape
        lora_A, lora_B = [], torch.empty(0)
        for number, member in enumerate(self.members):
            own_a, own_b = (read(name) for name in names(member.matrix))
            if not number:
                lora_B = torch.zeros(rows, self.rank, self.count, dtype=own_b.dtype)
            expert, row, rank = self.place(number)
            lora_A.append(own_a)
            lora_B[row : row + len(own_b), rank : rank + member.rank, expert] = own_b
        return {name_a: torch.cat(lora_A), name_b: lora_B.view(rows, total)}

    def pair(
        self, number: int, lora_A: torch.Tensor, lora_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, in) and B (out, rank) of the member of that number, from the tensors of
        :meth:`specs`."""
        expert, row, rank = self.place(number)
        own = self.members[number]
        piece = Slice(self.count, expert, row, own.matrix.shape[0])
        part_a, part_b = piece.of(lora_A, lora_B)
        return part_a[rank : rank + own.rank], part_b[:, rank : rank + own.rank]


def is_fused(matrix: Matrix) -> bool:
    """Whether the adapter of ``matrix`` is part of a fused one: experts that PEFT fuses itself have
    no name in memory."""
    return matrix.in_memory is not None and part_of(matrix.in_memory) is not None


def fused_adapters(members: Iterable[Member]) -> list[FusedAdapter]:
    """Those of ``members``, whose matrices are experts' (see :func:`is_fused`), in order of
    layers."""
    held: dict[str, dict[str, Member]] = {}
    for member in members:
        experts, part = part_of(member.matrix.in_memory or "") or ("", "")
        held.setdefault(experts, {})[part] = member
    found = []
    for experts, parts in held.items():
        leaves = {part.partition(".")[2] for part in parts}
        for parameter, alternatives in FUSED.items():
            for own in alternatives:
                if set(own) <= leaves:
                    leaves -= set(own)
                    numbers = sorted({int(part.partition(".")[0]) for part in parts})
                    ordered = [parts[f"{number}.{leaf}"] for number in numbers for leaf in own]
                    found.append(FusedAdapter(experts, parameter, own, ordered))
    return found
