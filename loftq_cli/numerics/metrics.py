"""Frobenius norms accumulated in float64, and the search for values that are not finite."""

from __future__ import annotations

import math

import torch


def squared_norm(rows: torch.Tensor) -> float:
    """Sum of squares of a 2-D float32 tensor: per row in float32, across rows in float64.

    A plain float32 norm is 8e-4 off on 16.8 million elements; rows are short enough not to be.
    Rows too large or too small to square in float32 are redone in float64.
    """
    norms = torch.linalg.vector_norm(rows, dim=1).double()
    total = float(norms.square().sum())
    if not math.isfinite(total) or total < 1e-30:
        total = float(rows.double().square().sum())
    return total


def first_non_finite(weight: torch.Tensor) -> tuple[tuple[int, ...], float] | None:
    """Index and value of the first NaN or Inf in row-major order, or None."""
    finite = torch.isfinite(weight)
    if bool(finite.all()):
        return None
    flat_index = int((~finite).reshape(-1).to(torch.uint8).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat_index), weight.shape))
    return index, float(weight[index])
