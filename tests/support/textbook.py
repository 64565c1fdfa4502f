"""The published algorithms, written as plainly as possible, in float64 and from their papers.

Nothing here shares code with the package: levels from the standard library's normal distribution,
quantization by argmin over all levels, low rank by the full SVD.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

import torch

NORMAL_OFFSET = 0.9677083  # QLoRA's outermost quantile


def normal_float(bits: int, symmetric: bool = False) -> torch.Tensor:
    """NormalFloat levels (QLoRA's construction, or the LoftQ authors' symmetric one), float64."""
    count = 2**bits

    def quantiles(first: float, last: float, steps: int) -> list[float]:
        span = [first + (last - first) * i / (steps - 1) for i in range(steps)]
        return [NormalDist().inv_cdf(p) for p in span]

    if symmetric:
        edges = quantiles(1 - NORMAL_OFFSET, NORMAL_OFFSET, count + 1)
        levels = [(a + b) / 2 for a, b in pairwise(edges)]
    else:
        above = quantiles(NORMAL_OFFSET, 0.5, count // 2 + 1)[:-1]
        below = quantiles(NORMAL_OFFSET, 0.5, count // 2)[:-1]
        levels = sorted(above + [0.0] + [-level for level in below])
    return torch.tensor(levels, dtype=torch.float64) / max(levels)


def quantize_absmax(weight: torch.Tensor, levels: torch.Tensor, block_size: int) -> torch.Tensor:
    """Every block of the flattened matrix: its largest magnitude times the nearest levels."""
    blocks = weight.reshape(-1, block_size)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    return (scales * _nearest(blocks / scales.where(scales != 0, 1), levels)).view_as(weight)


def quantize_uniform_block(weight: torch.Tensor, bits: int, block_size: int) -> torch.Tensor:
    """The LoftQ authors' "uniform": evenly spaced levels times mean + 2.5 standard deviations."""
    blocks = weight.reshape(-1, block_size)
    scales = (blocks.mean(dim=1) + 2.5 * blocks.std(dim=1))[:, None]
    levels = torch.linspace(-1, 1, 2**bits, dtype=torch.float64)
    return (scales * _nearest(blocks / scales, levels)).view_as(weight)


def uniform_tensor_levels(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The LoftQ authors' per-tensor levels: min to max after clipping to mean +- 2 deviations."""
    mean, reach = weight.mean(), 2 * weight.std()
    clipped = weight.clamp(mean - reach, mean + reach)
    step = (clipped.max() - clipped.min()) / (2**bits - 1)
    return clipped.min() + step * torch.arange(2**bits)


def quantize_uniform_tensor(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return _nearest(weight, uniform_tensor_levels(weight, bits))


def _nearest(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return levels[(x[..., None] - levels).abs().argmin(dim=-1)]


class Iterate(NamedTuple):
    Q: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    residual: float


def loftq(
    weight: torch.Tensor,
    quantize: Callable[[torch.Tensor], torch.Tensor],
    rank: int,
    iters: int,
    svd_first: bool = False,
    momentum: bool = False,
) -> list[Iterate]:
    """LoftQ, Algorithm 1 (arXiv:2310.08659): the iterates t = 1..T; or the same with momentum, as
    docs/algorithm.md describes it."""
    W = weight.double()
    B, A = low_rank(W if svd_first else torch.zeros_like(W), rank)
    iterates: list[Iterate] = []
    before = B @ A
    for t in range(iters):
        beta = 0.0 if t == 0 or not momentum else 0.5 if t == 1 and not svd_first else 0.7
        Q = quantize(W - B @ A - beta * (B @ A - before))
        before = B @ A
        B, A = low_rank(W - Q, rank)
        iterates.append(Iterate(Q, A, B, float(torch.linalg.norm(W - Q - B @ A))))
    return iterates


def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    U, sigma, Vt = torch.linalg.svd(matrix, full_matrices=False)
    root = sigma[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vt[:rank]


def gptq(
    weight: torch.Tensor,
    H: torch.Tensor,
    order: list[int],
    quantize: Callable[[torch.Tensor, int], torch.Tensor],
) -> torch.Tensor:
    """GPTQ (arXiv:2210.17323, Algorithm 1, without its batches): columns in ``order``, each error
    spread over those that are left by the inverse of their moments. ``quantize`` takes a column's
    values and its number."""
    W, Q = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for place, column in enumerate(order):
        left = order[place:]
        inverse = torch.linalg.inv(H.double()[left][:, left])
        Q[:, column] = quantize(W[:, column], column)
        error = (W[:, column] - Q[:, column]) / inverse[0, 0]
        W[:, left] -= error[:, None] * inverse[0]
    return Q
