"""The directions in which a layer's inputs are largest: what an adapter takes first.

The error of a quantization is about as large along every direction of the inputs, so that in the
norm ||.||_H it is largest along the leading eigenvectors of H, and a pair of rank r that takes the
error along r of them away is near the best one, if r is small beside the matrix.
"""

from __future__ import annotations

import torch

from loftq_cli.numerics.weighting import Weighting

_STEPS = 4
_OVERSAMPLING = 8


def leading(weighting: Weighting, count: int) -> torch.Tensor:
    """Orthonormal rows, float32 (count, in), about the ``count`` leading eigenvectors of H; count
    is at most in. By orthogonal iteration with Rayleigh and Ritz's choice; of a diagonal, the
    coordinates of its largest moments."""
    moments = weighting.moments
    if not weighting.is_full:
        chosen = moments.topk(count).indices
        units = moments.new_zeros(count, len(moments))
        units[torch.arange(count, device=units.device), chosen] = 1
        return units
    generator = torch.Generator().manual_seed(0)
    width = min(count + _OVERSAMPLING, len(moments))
    found = torch.randn((len(moments), width), generator=generator).to(moments.device)
    for _ in range(_STEPS):
        found = torch.linalg.qr(moments @ found).Q
    inner = found.T @ (moments @ found)
    vectors = torch.linalg.eigh((inner + inner.T) / 2).eigenvectors
    rows: torch.Tensor = (found @ vectors[:, -count:]).T.contiguous()
    return rows


def without(matrix: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Float32 (out, in) ``matrix`` less what it has along orthonormal ``directions`` (k, in)."""
    return torch.addmm(matrix, matrix @ directions.T, directions, alpha=-1)
