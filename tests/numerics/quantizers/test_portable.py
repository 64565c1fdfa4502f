"""Portable scales: what float16 and bfloat16 hold as it is, and the nearest such value."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_cli.numerics.quantizers.portable import is_portable, portable
from tests.support.quantizing import PROPERTY, SEARCHES, WIDTHS, fit, quantizer_of
from tests.support.synthetic import llm_like

FLOATS = st.floats(-65504, 65504, width=32)


def rounded(value: float) -> float:
    return float(portable(torch.tensor([value]))[0])


@PROPERTY
@given(FLOATS)
def test_float16_and_bfloat16_hold_them_and_float16_their_multiples(value):
    scale = rounded(value)
    if math.isinf(scale):
        return
    tensor = torch.tensor([scale])
    assert is_portable(tensor)
    assert torch.equal(tensor, tensor.half().float())
    assert torch.equal(tensor, tensor.bfloat16().float())
    for zero in range(1, 16):
        product = float(tensor.half() * zero)
        assert math.isinf(product) or Fraction(product) == Fraction(scale) * zero


@PROPERTY
@given(FLOATS)
def test_the_nearest_of_7_bits_in_multiples_of_2_to_the_minus_24(value):
    exact = abs(Fraction(value))
    exponent = -24
    while exact >= Fraction(2) ** exponent:
        exponent += 1
    step = Fraction(2) ** max(exponent - 7, -24)
    nearest = round(exact / step) * step  # Fraction rounds ties to even
    expected = float(nearest) if nearest <= 65504 else math.inf
    assert rounded(value) == math.copysign(expected, value)
    assert is_portable(torch.tensor([value])) == (nearest == exact)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, 0.0),
        (1 + 1 / 64, 1 + 1 / 64),
        (1 + 1 / 128, 1.0),
        (1 + 3 / 128, 1 + 2 / 64),
        (-0.3, -77 / 256),
        (2**-25, 0.0),
        (1.1 * 2**-25, 2**-24),
        (65_024.0, 65_024.0),
        (65_400.0, math.inf),
        (-1e9, -math.inf),
    ],
)
def test_by_hand(value, expected):
    assert rounded(value) == expected


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("method", ["uniform", "uniform-symmetric"])
@pytest.mark.parametrize("search", ["absmax", *SEARCHES])
def test_a_quantizer_rounds_the_scales_that_it_finds(bits, method, search):
    weight = llm_like(64, 64)
    free = fit(quantizer_of(method, bits, 64, search), weight).parameters
    found = fit(quantizer_of(method, bits, 64, search, portable=True), weight).parameters
    assert torch.equal(found.scales, portable(free.scales))
    assert torch.equal(found.zeros, free.zeros)
