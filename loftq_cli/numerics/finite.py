"""Weights as they are computed with: finite, and of 16 or 32 bits."""

from __future__ import annotations

import torch

from loftq_cli.errors import NonFiniteWeightError
from loftq_cli.numerics.metrics import first_non_finite


def computable(weight: torch.Tensor, where: str, *, sampled: bool = False) -> torch.Tensor:
    """``weight`` as it is, or in float32 if it is float64.

    Raises NonFiniteWeightError for NaN, Inf and values that float32 cannot hold. ``where`` names
    file and tensor; the place in it is named too, unless the rows are ``sampled``.
    """
    _refuse(weight, weight, where, "", sampled)
    if weight.dtype != torch.float64:
        return weight
    narrow = weight.float()
    _refuse(
        weight, narrow, where, ", which float32, the dtype it is computed in, cannot hold", sampled
    )
    return narrow


def _refuse(
    weight: torch.Tensor, values: torch.Tensor, where: str, why: str, sampled: bool
) -> None:
    bad = first_non_finite(values)
    if bad is not None:
        place = "" if sampled else f" at {list(bad[0])}"
        hint = "pass the tensor through with --exclude" if why else None
        raise NonFiniteWeightError(f"{where} holds {float(weight[bad[0]])}{place}{why}", hint=hint)
