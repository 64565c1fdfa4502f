"""Level tables against scipy, bitsandbytes and literals; threshold search against argmin."""

from __future__ import annotations

from itertools import pairwise

import bitsandbytes.functional
import pytest
import torch
from scipy.stats import norm

from loftq_cli.numerics.quantizers.codebooks import (
    decision_boundaries,
    evenly_spaced,
    make_table,
    nearest,
    normal_float,
)
from tests.support import textbook
from tests.support.quantizing import WIDTHS, gaussian

OFFSET = 0.9677083
TABLES = {
    **{f"nf{bits}": normal_float(bits) for bits in WIDTHS},
    **{f"nf{bits}-symmetric": normal_float(bits, symmetric=True) for bits in WIDTHS},
    **{f"evenly-spaced-{bits}": evenly_spaced(bits) for bits in WIDTHS},
}
every_table = pytest.mark.parametrize("levels", TABLES.values(), ids=TABLES.keys())


def argmin(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return (x[:, None] - levels).abs().argmin(dim=1)


def floats_around(x: torch.Tensor, ulps: int) -> torch.Tensor:
    """The float32 numbers up to ``ulps`` steps above and below every element of ``x``."""
    above, below = [x], [x]
    for _ in range(ulps):
        above.append(torch.nextafter(above[-1], torch.full_like(x, torch.inf)))
        below.append(torch.nextafter(below[-1], torch.full_like(x, -torch.inf)))
    return torch.cat(above + below)


@pytest.mark.parametrize("bits", WIDTHS)
def test_normal_float_is_qloras_construction(bits):
    count = 2**bits
    positive = norm.ppf(torch.linspace(OFFSET, 0.5, count // 2 + 1, dtype=torch.float64)[:-1])
    negative = -norm.ppf(torch.linspace(OFFSET, 0.5, count // 2, dtype=torch.float64)[:-1])
    expected = sorted([*positive, 0.0, *negative])
    expected = torch.tensor(expected, dtype=torch.float64) / expected[-1]
    torch.testing.assert_close(normal_float(bits).double(), expected, rtol=0, atol=1.5e-7)
    torch.testing.assert_close(textbook.normal_float(bits), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", WIDTHS)
def test_symmetric_normal_float_is_the_loftq_authors_construction(bits):
    edges = norm.ppf(torch.linspace(1 - OFFSET, OFFSET, 2**bits + 1, dtype=torch.float64))
    levels = [0.5 * a + 0.5 * b for a, b in pairwise(edges)]
    expected = torch.tensor(levels, dtype=torch.float64) / levels[-1]
    actual = normal_float(bits, symmetric=True)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(
        textbook.normal_float(bits, symmetric=True), expected, rtol=0, atol=1e-12
    )
    torch.testing.assert_close(actual, -actual.flip(0), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("levels", "literal"),
    [
        (normal_float(2), [-1.0, 0.0, 0.33791524171829224, 1.0]),
        (normal_float(2, symmetric=True), [-1.0, -0.252568, 0.252568, 1.0]),
        (evenly_spaced(2), [-1.0, -1 / 3, 1 / 3, 1.0]),
        (evenly_spaced(3), [-1.0, -5 / 7, -3 / 7, -1 / 7, 1 / 7, 3 / 7, 5 / 7, 1.0]),
    ],
    ids=["nf2", "nf2-symmetric", "evenly-spaced-2", "evenly-spaced-3"],
)
def test_golden_levels(levels, literal):
    torch.testing.assert_close(levels, torch.tensor(literal), rtol=0, atol=5e-7)


def test_nf4_is_bitsandbytes_table_to_the_last_bit():
    theirs = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    assert normal_float(4).dtype == torch.float32
    assert torch.equal(normal_float(4), theirs)


@every_table
def test_levels_ascend_from_about_minus_one_to_one(levels):
    assert levels.dtype == torch.float32
    assert bool((levels.diff() > 0).all())
    assert float(levels[-1]) == 1
    assert float(levels[0]) == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("bits", WIDTHS)
def test_only_the_asymmetric_table_holds_zero(bits):
    assert int((normal_float(bits) == 0).sum()) == 1
    assert int((normal_float(bits, symmetric=True) == 0).sum()) == 0


@every_table
def test_boundaries_agree_with_argmin_around_every_midpoint(levels):
    boundaries = decision_boundaries(levels)
    midpoints = (levels[:-1] + levels[1:]) / 2
    x = torch.cat([floats_around(midpoints, 40), floats_around(boundaries, 40)])
    codes = (x[:, None] > boundaries).sum(dim=1)
    assert torch.equal(codes, argmin(x, levels))


@every_table
def test_boundaries_agree_with_argmin_on_random_values(levels):
    x = torch.cat([gaussian(20_000), gaussian(20_000, seed=1) / 10])
    assert torch.equal((x[:, None] > decision_boundaries(levels)).sum(dim=1), argmin(x, levels))


def test_a_tie_goes_to_the_lower_level():
    boundaries = decision_boundaries(torch.tensor([-1.0, 0.0, 0.5, 1.0]))
    assert boundaries.tolist() == [-0.5, 0.25, 0.75]


@every_table
def test_nearest_is_argmin_anywhere(levels):
    x = torch.cat(
        [
            gaussian(20_000),
            floats_around(decision_boundaries(levels), 3),
            levels,
            torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0001, -1.0001, 50.0, -50.0]),
        ]
    )
    codes = nearest(x, make_table(levels))
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.long(), argmin(x, levels))


@every_table
def test_nearest_of_a_level_is_that_level(levels):
    codes = nearest(levels, make_table(levels))
    assert codes.tolist() == list(range(len(levels)))


@every_table
@pytest.mark.parametrize("far", [1.5, 1e9, 3e38, torch.inf])
def test_nearest_saturates_far_outside_the_range(levels, far):
    codes = nearest(torch.tensor([-far, far]), make_table(levels))
    assert codes.tolist() == [0, len(levels) - 1]
