"""A trained model, merged and quantized again: what ``loftq export --merge`` writes.

How far training has moved the model, and how far its new codes are from it, is told by norms: of
what layers put out if there are statistics, else of weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.errors import InputError, ScaleRangeError
from loftq_cli.exporting.plan import ExportPlan, Requantized
from loftq_cli.families.kinds import turned
from loftq_cli.layouts.trained import TrainedAdapter
from loftq_cli.layouts.trained_parts import Pair
from loftq_cli.machine.resources import check_memory
from loftq_cli.merging.value import product_of, summed
from loftq_cli.numerics import feedback
from loftq_cli.numerics.decomposition import Norms
from loftq_cli.numerics.quantizers.methods import method
from loftq_cli.planning.decomposer import Decomposer
from loftq_cli.settings.recipe import Recipe
from loftq_cli.statistics.statistics import FULL, Statistics

_COPIES = 5
"""Of a matrix, in float32: the sum, its product, what a sweep holds."""


class Requantizer:
    """Quantizes what the merge of ``plan`` sums up, with the methods and widths that there are, on
    ``device``. ``start`` is the adapter that training began with, None if it is not there."""

    def __init__(
        self,
        plan: ExportPlan,
        start: TrainedAdapter | None,
        statistics: Statistics | None,
        device: torch.device,
    ) -> None:
        self._plan, self._start, self._statistics = plan, start, statistics
        self._device = device
        recipe = Recipe.read(plan.output.manifest["recipe"])
        self._decomposer = Decomposer(recipe, plan.layout, device, statistics)

    def check(self) -> None:
        """Raise StatisticsError if the statistics lack a matrix, EnvironmentFailure if memory is
        too little."""
        matrices = self._plan.matrices
        if self._statistics is not None:
            self._statistics.require({matrix.name: matrix.shape[1] for matrix in matrices})
        needed = {}
        for matrix in matrices:
            needed[matrix.name] = _COPIES * 4 * matrix.elements
            if self._decomposer.kind(matrix) == FULL:
                moments = feedback.working_bytes(
                    *matrix.shape, self._device, method(matrix.method).rows_together
                )
                needed[matrix.name] += moments + 8 * matrix.shape[1] ** 2
        largest = max(needed, key=needed.__getitem__)
        check_memory(needed[largest], f"tensor {largest!r}", self._device)

    def requantize(self, item: Requantized) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors of ``item``, and what the manifest's entry says otherwise than before. Raises
        InputError if a value is not finite or too large."""
        plan, matrix = self._plan, item.matrix
        assert plan.merging is not None
        value = summed(plan.merging, item.merged)
        weight = turned(value, matrix.kind).contiguous().to(self._device)
        try:
            result = self._decomposer.quantize(weight, matrix, feedback=True)
        except (ScaleRangeError, InputError) as error:
            raise type(error)(f"{matrix.name}: {error.message}", hint=error.hint) from error
        record: dict[str, Any] = {
            "shape": list(matrix.shape),
            "rank": 0,
            "step": 0,
            "frobenius": asdict(result.frobenius),
            "moved": self._moved(item, result.weighted),
        }
        if result.weighted is not None:
            kind = self._decomposer.kind(matrix)
            record["weighted"] = {"kind": kind, **asdict(result.weighted)}
        return item.wanted.encode(matrix, result.quantized), record

    def _moved(self, item: Requantized, weighted: Norms | None) -> float | None:
        """|D| of a matrix, None if the start is not known."""
        if self._start is None:
            return None
        before = self._start.pairs.get(item.matrix.adapted)
        after = item.merged.weight.pair
        assert self._plan.merging is not None
        change = torch.zeros(item.matrix.shape, device=self._device)
        for pair, adapter, sign in (
            (after, self._plan.merging.adapter, 1.0),
            (before, self._start, -1.0),
        ):
            if pair is not None:
                self._add(change, pair, adapter, sign)
        weighting = None if weighted is None else self._decomposer.weighting(item.matrix)
        if weighting is None:
            return float(torch.linalg.vector_norm(change))
        return weighting.norm(change)

    def _add(self, change: torch.Tensor, pair: Pair, adapter: TrainedAdapter, sign: float) -> None:
        """Add the product of ``pair``; rows of ``change`` beyond it are of added tokens."""
        with TensorFile(adapter.file) as file:
            product = product_of(pair, file)
        product = product.T if pair.embedding else product
        change[: len(product)].add_(product.to(self._device), alpha=sign * pair.scaling)


def distances(records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """By how much training moved the weights, and by how much the new codes are off, also if they
    had been chosen without feedback (``plain``): norms over all ``records``, relative to that of
    the weights; ``moved`` None if the start is not known."""
    norms = "weighted" if all("weighted" in record for record in records) else "frobenius"
    weight = _norm(record[norms]["weight"] for record in records) or 1.0
    moves = [record["moved"] for record in records]
    return {
        "moved": None if None in moves else _norm(moves) / weight,
        "off": _norm(record[norms]["final"] for record in records) / weight,
        "plain": _norm(record[norms]["quantized"] for record in records) / weight,
    }


def _norm(values: Iterable[float]) -> float:
    return math.hypot(*values)
