"""The adapter of a conversion as llama.cpp reads one: pairs by the names and rows of its file.

llama.cpp adds alpha / rank times B A to a tensor's product, with one alpha for all (if that is not
zero: ``llama-adapter.h``). Ranks differ here, so alpha is zero, and B has the scaling in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.exporting.gguf.file import F32, FLOAT32, Field, GgufTensor
from loftq_cli.exporting.gguf.plan import Entry, GgufPlan
from loftq_cli.exporting.gguf.rows import runs
from loftq_cli.exporting.pairs import pairs_of, rank_of
from loftq_cli.layouts.trained_parts import Pair
from loftq_cli.merging.plan import MergePlan


@dataclass(frozen=True)
class GgufAdapter:
    """The ``pairs`` of matrices, by name, for the tensors of a ``plan``."""

    plan: GgufPlan
    merging: MergePlan

    @cached_property
    def pairs(self) -> Mapping[str, Pair]:
        """Raises InputError if the adapter holds more than pairs."""
        return pairs_of(self.merging, "llama.cpp")

    @property
    def fields(self) -> dict[str, Field]:
        """The header's."""
        return {
            "general.type": Field.text("adapter"),
            "general.architecture": Field.text(self.plan.skeleton.architecture),
            "adapter.type": Field.text("lora"),
            "adapter.lora.alpha": Field.number(FLOAT32, 0.0),
        }

    def entries(self) -> list[tuple[Entry, list[GgufTensor]]]:
        """Each tensor that has a pair, and the two that this becomes."""
        pairs, found = self.pairs, []
        for entry in self.plan.entries:
            if entry.found is None or not any(name in pairs for name in entry.found.matrices):
                continue
            *stack, rows, columns = entry.skeleton.shape
            rank = self._rank(entry, pairs)
            name = entry.skeleton.name
            lora_a = GgufTensor(f"{name}.lora_a", F32, (*stack, rank, columns))
            found.append((entry, [lora_a, GgufTensor(f"{name}.lora_b", F32, (*stack, rows, rank))]))
        return found

    def tensors(self, entry: Entry) -> Sequence[torch.Tensor]:
        """lora_a (…, rank, in) and lora_b (…, out, rank) of a tensor, float32: the rows of B are in
        its order; of several matrices the A are stacked, the B side by side."""
        assert entry.found is not None
        pairs = self.pairs
        *stack, rows, columns = entry.skeleton.shape
        count, rank = (stack or [1])[0], self._rank(entry, pairs)
        lora_a, lora_b = torch.zeros(count, rank, columns), torch.zeros(count * rows, rank)
        used = [0] * count
        with TensorFile(self.merging.adapter.file) as file:
            for number, places, own in runs(entry.found):
                pair = pairs.get(entry.found.matrices[number])
                if pair is None:
                    continue
                part_a, part_b = pair.read(file)
                homes = torch.unique(places // rows).tolist()
                for home in homes:
                    first, last = used[home], used[home] + len(part_a)
                    here = places // rows == home
                    lora_a[home, first:last] = part_a
                    lora_b[places[here], first:last] = part_b[own[here]] * pair.scaling
                    used[home] = last
        return (
            lora_a.view(*stack, rank, columns),
            lora_b.view(*stack, rows, rank),
        )

    def _rank(self, entry: Entry, pairs: Mapping[str, Pair]) -> int:
        """The largest sum of the ranks of the matrices that one part of a tensor is made of."""
        assert entry.found is not None
        rows = entry.skeleton.shape[-2]
        sums: dict[int, int] = {}
        for number, places, _ in runs(entry.found):
            pair = pairs.get(entry.found.matrices[number])
            for home in torch.unique(places // rows).tolist():
                rank = 0 if pair is None else rank_of(pair)
                sums[home] = sums.get(home, 0) + rank
        return max(sums.values())
