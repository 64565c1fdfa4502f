"""What every matrix would lose at every width, from a sample of its rows.

This is what a target of stored bits is allocated by (target.py): not the residual that a conversion
ends with, but cheap, and in about the same order. With statistics it is without what the adapter
will take away; with sensitivities it is in what it adds to the model's loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from loftq_cli.checkpoint.deliveries import Deliveries
from loftq_cli.checkpoint.encoded import EncodedTensor, foreign
from loftq_cli.checkpoint.header import StoredTensor, TensorSpec
from loftq_cli.checkpoint.reader import TensorFile, as_tensor
from loftq_cli.checkpoint.source import Shard
from loftq_cli.errors import InputError
from loftq_cli.families.kinds import turned
from loftq_cli.layouts.base import Matrix
from loftq_cli.machine.observer import Observer
from loftq_cli.numerics.finite import computable
from loftq_cli.numerics.leading import leading, without
from loftq_cli.numerics.weighting import Weighting
from loftq_cli.planning.decomposer import Decomposer
from loftq_cli.planning.plan import Plan

_RUNS, _RUN = 32, 8
"""Rows are sampled in this many runs of this many, from the middles of equal parts."""


def estimate(
    plan: Plan, widths: Mapping[str, Sequence[Matrix]], observer: Observer
) -> dict[str, list[float]]:
    """||W - quantize(W)||^2 of each matrix, by name, in each of the forms that ``widths`` gives it.

    With statistics it is ||W - quantize(W)||_H^2, less what that has along the largest directions
    of the inputs, as many as the adapter has ranks; what they hold nothing for counts as if all its
    inputs were as large as those of the others are on average. With sensitivities it is half the
    product of that and the sensitivity: nats per token. A matrix without one has the mean of the
    others. Reads sampled rows of these matrices only, but has whole shards brought for that.

    Raises what their supply raises, what ``Statistics.moments`` raises, NonFiniteWeightError for
    NaN or Inf among the rows, InputError if values are too large for float32 arithmetic.
    """
    tensors = {
        shard.name: [tensor for tensor in shard.header.tensors if tensor.name in widths]
        for shard in plan.source.shards
    }
    names = [name for name, found in tensors.items() if found]
    sizes = {
        tensor.name: _sampled_bytes(tensor, widths[tensor.name][0])
        for found in tensors.values()
        for tensor in found
    }
    observer.begin(sum(sizes.values()), "settling widths")
    errors, units = {}, {}
    estimates = _Estimates(plan, Decomposer(plan.recipe, plan.layout, plan.device, plan.statistics))
    try:
        with Deliveries(plan.source, names, observer) as deliveries:
            for shard in plan.source.shards:
                for name in (*foreign(shard), shard.name) if tensors[shard.name] else ():
                    deliveries.take(name)
                for tensor in tensors[shard.name]:
                    observer.working_on(tensor.name)
                    forms = widths[tensor.name]
                    errors[tensor.name] = estimates.errors(shard, tensor, forms)
                    weighting = estimates.decomposer.weighting(forms[0])
                    if weighting is not None:
                        units[tensor.name] = weighting.unit
                    observer.advance(sizes[tensor.name])
                deliveries.done(shard.name)
    finally:
        observer.end()
    if units:
        average = math.fsum(units.values()) / len(units)
        for name in errors.keys() - units.keys():
            errors[name] = [value * average for value in errors[name]]
    return _in_loss(errors, plan)


class _Estimates:
    """One after the other: directions are found once for matrices that share their inputs."""

    def __init__(self, plan: Plan, decomposer: Decomposer) -> None:
        self.decomposer = decomposer
        self._plan = plan
        self._last: tuple[Weighting, torch.Tensor] | None = None

    def errors(self, shard: Shard, tensor: StoredTensor, forms: Sequence[Matrix]) -> list[float]:
        matrix = forms[0]  # all have its shape
        rows = _sample(shard, tensor, matrix).to(self._plan.device)
        scaling = matrix.shape[0] / rows.shape[0]
        taken = self._taken(matrix)
        squared = [squared_residual(rows, form, self.decomposer, taken) for form in forms]
        if not all(math.isfinite(value) for value in squared):
            raise InputError(
                f"{shard.path}: tensor {tensor.name!r}: values are too large for float32",
                hint="pass the tensor through with --exclude",
            )
        return [value * scaling for value in squared]

    def _taken(self, matrix: Matrix) -> torch.Tensor | None:
        """The directions of the inputs along which the adapter will take the error away."""
        weighting = self.decomposer.weighting(matrix)
        rank = self._plan.matrices[matrix.name].rank
        if weighting is None or not self._plan.recipe.iters:
            self._last = None
            return None
        if self._last is None or self._last[0] is not weighting or len(self._last[1]) != rank:
            self._last = weighting, leading(weighting, rank)
        return self._last[1]


def _in_loss(errors: dict[str, list[float]], plan: Plan) -> dict[str, list[float]]:
    """What ``errors`` add to the model's loss, if the statistics tell."""
    known = {} if plan.statistics is None else plan.statistics.sensitivity
    own = [known[name] for name in errors if name in known]
    if not any(own):
        return errors
    average = math.fsum(own) / len(own)
    return {
        name: [value * known.get(name, average) / 2 for value in each]
        for name, each in errors.items()
    }


def squared_residual(
    rows: torch.Tensor,
    matrix: Matrix,
    decomposer: Decomposer,
    taken: torch.Tensor | None = None,
) -> float:
    """||W - quantize(W)||^2, or with statistics ||.||_H^2, of float32 ``rows`` (some, in) of
    ``matrix``, at its width and with its method, quantized and stored as the conversion would;
    less what that has along ``taken``, orthonormal (k, in)."""
    sweep = decomposer.sweep(rows, matrix)
    squared = sweep.quantize(None, None).squared
    weighting = decomposer.weighting(matrix)
    if weighting is None:
        return squared
    rest = sweep.residual if taken is None else without(sweep.residual.float(), taken)
    return weighting.norm(rest) ** 2


def _runs(rows: int) -> list[tuple[int, int]]:
    """(first row, number of rows) of the runs that are sampled of so many rows."""
    if rows <= _RUNS * _RUN:
        return [(0, rows)]
    middles = [(2 * number + 1) * rows // (2 * _RUNS) for number in range(_RUNS)]
    return [(middle - _RUN // 2, _RUN) for middle in middles]


def _is_scattered(tensor: StoredTensor, matrix: Matrix) -> bool:
    """Whether the rows of ``matrix`` are not together in the file, or are held in codes."""
    return matrix.kind == "conv1d" or isinstance(tensor, EncodedTensor)


def _sampled_bytes(tensor: StoredTensor, matrix: Matrix) -> int:
    if _is_scattered(tensor, matrix):
        return tensor.nbytes
    rows = tensor.shape[0]
    return tensor.nbytes // rows * sum(count for _, count in _runs(rows))


def _sample(shard: Shard, tensor: StoredTensor, matrix: Matrix) -> torch.Tensor:
    """The sampled rows of ``matrix``, float32 (some, in)."""
    rows, columns = matrix.shape
    runs = _runs(rows)
    with TensorFile(shard.path) as file:
        if _is_scattered(tensor, matrix):
            whole = turned(file.read(tensor), matrix.kind)
            parts = [whole[first : first + count] for first, count in runs]
            sample = torch.cat(parts)
        else:
            row_bytes = tensor.nbytes // rows
            buffer = bytearray()
            for first, count in runs:
                buffer += file.read_range(tensor.start + first * row_bytes, count * row_bytes)
            shape = (sum(count for _, count in runs), columns)
            sample = as_tensor(TensorSpec(tensor.name, tensor.dtype, shape), buffer)
    return computable(sample, f"{shard.path}: tensor {tensor.name!r}", sampled=True).float()
