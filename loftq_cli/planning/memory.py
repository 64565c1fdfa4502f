"""How much memory a conversion takes at most, estimated from its plan."""

from __future__ import annotations

from loftq_cli.checkpoint.dtypes import BITS
from loftq_cli.numerics import feedback, refit
from loftq_cli.numerics.quantizers.methods import method
from loftq_cli.planning.plan import Plan, PlannedMatrix


def memory_bytes(plan: Plan) -> int:
    """Estimated peak in bytes for the largest matrix, above what importing torch takes: the
    source's bytes, those of the next one too, W - Q in float32 and in the products' dtype, three
    sets of codes, the thin factors, and with statistics the second moments, what the adapter leaves
    of W - Q, and what feedback makes of full moments."""
    return max(_working_set(item) for item in plan.matrices.values()) + _moments(plan)


def _moments(plan: Plan) -> int:
    if plan.statistics is None:
        return 0
    entries = plan.statistics.entries.values()
    sides = ((e.in_features, e.in_features if e.kind == "full" else 1) for e in entries)
    moments = max(rows * columns for rows, columns in sides) * 8
    moments += max(item.matrix.elements for item in plan.matrices.values()) * 4
    if plan.recipe.feedback and any(entry.kind == "full" for entry in entries):
        matrices = [item.matrix for item in plan.matrices.values()]
        together = max(method(matrix.method).rows_together for matrix in matrices)
        moments += max(feedback.working_bytes(*m.shape, plan.device, together) for m in matrices)
        if plan.recipe.feedback_passes > 1:
            sides = ((m.shape[1], m.block_size) for m in matrices)
            moments += max(refit.working_bytes(*each, together) for each in sides)
    return moments


def _working_set(item: PlannedMatrix) -> int:
    rows, columns = item.matrix.shape
    thin = (rows + columns) * 2 * max(item.rank, 16) * 4 * 4
    source = BITS[item.matrix.dtype] // 8
    return item.matrix.elements * (2 * source + 4 + 2 + 3) + thin
