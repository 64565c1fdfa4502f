"""Where the search for least-squares scales begins; shared by all quantizers and both kernels.

The first alternation step evaluates a grid of scales and refines the best by least squares. Later
steps begin beside the previous step's scale, never at it: a least-squares scale is a fixed point
of its own codes, and an alternation that starts there leaves almost every code where it was.
Displacing the start by about half the spacing of the levels lets codes move, and every further step
gains: 1 % of the residual at 2 bits, 2 % at 3 and 4 (docs/algorithm.md).

Where a codebook is not symmetric a scale may be negative, which mirrors the levels: the sign bit is
stored anyway, and choosing it per block lowers the error by another 2 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from loftq_cli.numerics.quantizers.codebooks import Table

LARGEST_BLOCK = 256
"""Elements of a block that the compiled kernels have room for."""

REFINEMENTS = 2
"""Least-squares steps after the best start."""

COLD_GRID = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Multiples of absmax (codebooks) or of the min-max step (uniform)."""

_COLD_GRID_MIRRORED = {2: (1.0, 0.8, 0.65, 0.5, 0.35)}  # both signs: wide levels need no more

_DISPLACEMENTS = {2: 0.25, 3: 0.12, 4: 0.05, 8: 0.004}


def grid(bits: int, *, warm: bool, mirrored: bool = False) -> tuple[float, ...]:
    """Multiples of the base scale to begin at: of the previous step's if ``warm``. ``mirrored``:
    scales of the other sign are worth trying."""
    if not warm:
        if not mirrored:
            return COLD_GRID
        either = _COLD_GRID_MIRRORED.get(bits, COLD_GRID)
        return (*either, *(-multiple for multiple in either))
    displacement = _DISPLACEMENTS[bits]
    beside = (1 - displacement, 1 + displacement)
    return (*beside, -1.0) if mirrored else beside


@dataclass(frozen=True)
class Search:
    """A quantizer with searched scales, as the compiled kernels take it: a codebook ``table``
    (blocks over the flattened matrix), or zero points if it is None (along each row), then with
    ``portable`` scales or not, and with the zero point in the middle if ``symmetric``."""

    bits: int
    block_size: int
    table: Table | None
    portable: bool = False
    symmetric: bool = False
