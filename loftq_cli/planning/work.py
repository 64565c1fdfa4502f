"""How long the tensors of a conversion take, relative to one another: what progress goes by."""

from __future__ import annotations

from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.numerics.quantizers.methods import method
from loftq_cli.planning.plan import Plan, PlannedMatrix

# Nanoseconds of one core of 2026, of an element and, the last, a byte: a 1024 x 1024 matrix with nf
# and uniform at ranks 16 and 64, with no, diagonal and full moments.
_ONCE = 12.0
_STEP = 11.0
_OF_RANK = 0.17
_OF_MOMENTS = 0.06  # times in_features
_COPIED = 1.0


def work(plan: Plan, tensor: StoredTensor) -> int:
    """What ``tensor`` takes, in about nanoseconds of one core."""
    item = plan.matrices.get(tensor.name)
    copied = _COPIED * tensor.nbytes
    return round(copied if item is None else copied + _of_matrix(plan, item))


def reading(nbytes: int) -> int:
    """What it takes to read and hash so many bytes, in the same measure."""
    return round(_COPIED * nbytes)


def _of_matrix(plan: Plan, item: PlannedMatrix) -> float:
    matrix, recipe = item.matrix, plan.recipe
    effort = 1.0 if plan.given is not None else method(matrix.method).effort
    step = _STEP * effort + _OF_RANK * item.rank
    held = plan.statistics
    if held is not None and matrix.name in held.matrices and held.kind(matrix.name) == "full":
        step += _OF_MOMENTS * matrix.shape[1]
    return matrix.elements * (_ONCE * effort + recipe.iters * step)
