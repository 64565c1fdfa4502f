"""Level tables, and the decision boundaries that make threshold search equal argmin.

A codebook is an ascending float32 vector of ``2**bits`` levels in [-1, 1]; a block of weights is
its scale times levels. ``nf`` is the NormalFloat of QLoRA (arXiv:2305.14314, section 3 and the
construction in bitsandbytes' ``create_normal_map``, offset 0.9677083), asymmetric with an exact
zero; ``nf-symmetric`` is the variant of the LoftQ reference code, without a zero.
"""

from __future__ import annotations

import functools

import torch

NORMAL_OFFSET = 0.9677083
"""Probability of the outermost NormalFloat quantile (QLoRA's reference construction)."""

# bitsandbytes' float32 table, to the last bit: its kernels hold these constants, so the bnb
# layout must use exactly them. The construction below agrees to 1e-7.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@functools.cache
def normal_float(bits: int, symmetric: bool = False) -> torch.Tensor:
    """NormalFloat levels: float32, shape (2**bits,), ascending, largest level 1.

    The asymmetric table has one more positive than negative level and an exact zero.
    """
    if bits == 4 and not symmetric:
        return torch.tensor(_NF4, dtype=torch.float32)
    count = 2**bits
    if symmetric:
        edges = torch.special.ndtri(
            torch.linspace(1 - NORMAL_OFFSET, NORMAL_OFFSET, count + 1, dtype=torch.float64)
        )
        levels = (edges[:-1] + edges[1:]) / 2
    else:
        positive = torch.linspace(NORMAL_OFFSET, 0.5, count // 2 + 1, dtype=torch.float64)[:-1]
        negative = torch.linspace(NORMAL_OFFSET, 0.5, count // 2, dtype=torch.float64)[:-1]
        zero = torch.zeros(1, dtype=torch.float64)
        levels = torch.cat([torch.special.ndtri(positive), zero, -torch.special.ndtri(negative)])
    levels = levels.sort().values.to(torch.float64)
    normalized: torch.Tensor = levels / levels.max()
    return normalized.to(torch.float32)


@functools.cache
def evenly_spaced(bits: int) -> torch.Tensor:
    """linspace(-1, 1, 2**bits), float32: the LoftQ reference code's block-wise "uniform" table."""
    return torch.linspace(-1, 1, 2**bits, dtype=torch.float32)


def decision_boundaries(levels: torch.Tensor) -> torch.Tensor:
    """Thresholds t with ``sum_k(x > t_k) == argmin_k |x - levels_k|`` for every float32 x.

    ``levels``: float32 (n,), strictly ascending. Returns float32 (n - 1,). The midpoint of two
    levels is not enough: argmin compares rounded differences and gives ties to the lower index,
    so each threshold is the largest float32 x for which the lower level still wins.
    """
    low, high = levels[:-1], levels[1:]
    wins, loses = low.clone(), high.clone()  # bisection: the lower level wins at one, not the other
    for _ in range(200):  # enough to halve an interval of width 2 down to the smallest subnormal
        middle = wins + (loses - wins) / 2
        lower_wins = (middle - low).abs() <= (middle - high).abs()
        wins = torch.where(lower_wins, middle, wins)
        loses = torch.where(lower_wins, loses, middle)
    return wins
