"""The trellis code in plain Python and float64: its levels, which code chooses which, and the
cheapest codes of a ring by trying every beginning."""

from __future__ import annotations

from statistics import NormalDist

import torch

COUNT = 1024


def levels() -> list[float]:
    """Quantiles of the normal distribution, of unit mean square, in the order of a hash."""

    def mixed(number: int) -> int:
        number = number * 0x8E83FDEB % 2**32
        number ^= number >> 15
        number = number * 0x2C1B3C6D % 2**32
        return number ^ number >> 12

    quantiles = [NormalDist().inv_cdf((place + 0.5) / COUNT) for place in range(COUNT)]
    size = (sum(value * value for value in quantiles) / COUNT) ** 0.5
    found = [0.0] * COUNT
    for place, number in enumerate(sorted(range(COUNT), key=mixed)):
        found[number] = round(quantiles[place] / size * 8192) / 8192
    return found


def values(codes: torch.Tensor) -> torch.Tensor:
    """What ``codes`` (out, in) decode to at scales of 1, float64."""
    table, rows = torch.tensor(levels(), dtype=torch.float64), codes.shape[0]
    best = (-1.510, -0.4528, 0.4528, 1.510)
    alone = torch.stack([table[(table - value).abs().argmin()] for value in best])
    found = torch.empty(codes.shape, dtype=torch.float64)
    for row in range(rows):
        first = row - row % 256
        length = min(256, rows - first)
        places = [first + (row - first - above) % length for above in range(5)]
        number = sum(codes[place].long() * 4**above for above, place in enumerate(places))
        found[row] = table[number] if length >= 24 else alone[codes[row].long()]
    return found


def least_cost(wanted: torch.Tensor, scales: torch.Tensor) -> float:
    """The least sum of (wanted - scale * level)^2 over a ring, of all codes; both (length,)."""
    table = torch.tensor(levels(), dtype=torch.float64)
    groups = COUNT // 4
    # One row for each group of states that the ring may begin after, and so end with.
    cost = torch.full((groups, groups), torch.inf, dtype=torch.float64).fill_diagonal_(0.0)
    for value, scale in zip(wanted.double(), scales.double(), strict=True):
        each = cost.repeat_interleave(4, dim=1) + (value - scale * table).square()
        cost = each.view(groups, 4, groups).amin(dim=1)
    return float(cost.diagonal().min())
