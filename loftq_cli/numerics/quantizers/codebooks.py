"""Level tables, and the decision boundaries that make threshold search equal argmin.

A codebook is an ascending float32 vector of ``2**bits`` levels in [-1, 1]; a block of weights is
its scale times levels. ``nf`` is the NormalFloat of QLoRA (arXiv:2305.14314, section 3 and the
construction in bitsandbytes' ``create_normal_map``, offset 0.9677083), asymmetric with an exact
zero; ``nf-symmetric`` is the variant of the LoftQ reference code, without a zero.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

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

_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


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


@functools.cache
def iq4_nl() -> torch.Tensor:
    """The levels of llama.cpp's IQ4_NL, float32 (16,): its integers (``kvalues_iq4nl`` in
    ggml-common.h), of which this module has 128ths."""
    return torch.tensor(_IQ4_NL, dtype=torch.float32) / 128


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


@dataclass(frozen=True)
class Table:
    """A codebook with what a fast nearest-level search needs (see :func:`nearest`).

    ``reciprocal``: normalize by multiplying with 1 / scale, as bitsandbytes does. ``symmetric``:
    mirroring the levels changes nothing.
    """

    levels: torch.Tensor
    boundaries: torch.Tensor
    lowest: float
    cell_code: torch.Tensor
    cell_boundary: torch.Tensor
    reciprocal: bool
    symmetric: bool
    _copies: dict[torch.device, Table] = field(default_factory=dict, compare=False, repr=False)

    @property
    def cells(self) -> int:
        return self.cell_code.numel()

    @property
    def cells_per_unit(self) -> float:
        return self.cells / (1.0 - self.lowest)

    def to(self, device: torch.device) -> Table:
        """The same on ``device``, brought there once."""
        if self.levels.device == device:
            return self
        if device not in self._copies:
            self._copies[device] = replace(
                self,
                levels=self.levels.to(device),
                boundaries=self.boundaries.to(device),
                cell_code=self.cell_code.to(device),
                cell_boundary=self.cell_boundary.to(device),
                _copies={},
            )
        return self._copies[device]


def make_table(levels: torch.Tensor, as_bitsandbytes: bool = False) -> Table:
    """Divide the range of ``levels`` into equal cells with at most one decision boundary each.

    ``as_bitsandbytes`` decides ties as its quantizer does, so that codes agree to the last bit:
    at the rounded midpoints of the levels, and after multiplying by the scale's reciprocal. Both
    differ from argmin over ``|x / scale - level|`` by one unit in the last place, if at all.

    Where a cell's boundary is, and which code applies below it, are two table look-ups; the
    search then costs the same at any width, and rounding cannot matter: the cell index is a
    monotone function of x, and inside a boundary's cell x is compared with the boundary itself.
    """
    boundaries = (levels[:-1] + levels[1:]) / 2 if as_bitsandbytes else decision_boundaries(levels)
    lowest = float(levels[0])
    cells = 64
    index = _cell_index(boundaries, lowest, cells)
    while not bool((index.diff() > 0).all()):
        cells *= 2
        if cells > 1 << 16:
            raise ValueError("codebook levels are too close together")
        index = _cell_index(boundaries, lowest, cells)
    cell_boundary = torch.full((cells,), float("inf"))
    cell_boundary[index] = boundaries
    occupied = torch.zeros(cells, dtype=torch.int64)
    occupied[index] = 1
    cell_code = (occupied.cumsum(0) - occupied).to(torch.uint8)
    symmetric = torch.equal(levels, -levels.flip(0))
    return Table(levels, boundaries, lowest, cell_code, cell_boundary, as_bitsandbytes, symmetric)


def _cell_index(x: torch.Tensor, lowest: float, cells: int) -> torch.Tensor:
    # The range is at most [-|lowest|, 1]; what lies outside it saturates into the outer cells.
    position = (x - lowest) * (cells / (1.0 - lowest))
    return position.clamp_(0, cells - 1).to(torch.int64)


def nearest(x: torch.Tensor, table: Table) -> torch.Tensor:
    """Index of the nearest level, ties to the lower one: uint8, the shape of ``x``."""
    if table.levels.numel() == 4:
        code = (x > table.boundaries[0]).view(torch.uint8)
        for boundary in table.boundaries[1:]:
            code.add_((x > boundary).view(torch.uint8))
        return code
    index = _cell_index(x, table.lowest, table.cells)
    code = table.cell_code.take(index)
    return code.add_((x > table.cell_boundary.take(index)).view(torch.uint8))


@functools.cache
def normal_float_table(bits: int, symmetric: bool) -> Table:
    """The table of :func:`normal_float`; at 4 bits and not symmetric, ties go as in
    bitsandbytes."""
    levels = normal_float(bits, symmetric)
    return make_table(levels, as_bitsandbytes=bits == 4 and not symmetric)


@functools.cache
def evenly_spaced_table(bits: int) -> Table:
    """The table of :func:`evenly_spaced`."""
    return make_table(evenly_spaced(bits))


@functools.cache
def iq4_nl_table() -> Table:
    """The table of :func:`iq4_nl`."""
    return make_table(iq4_nl())
