"""Scales between a matrix and a quantization of it: found, believed as far as they are known, and
not seen where there are none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_cli.numerics.rescaling import counterpart, fit
from tests.support.quantizing import PROPERTY, gaussian

SHAPES = [(64, 64), (96, 160), (256, 128)]


def rounded(weight: torch.Tensor, bits: int, clip: float = 1.0, size: int = 32) -> torch.Tensor:
    """To nearest, with a zero point for each group of ``size``; ``clip``: of the range."""
    groups = weight.double().reshape(len(weight), -1, size)
    low, high = groups.amin(-1, True) * clip, groups.amax(-1, True) * clip
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    codes = ((groups / scale).round() + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) * scale).view_as(weight).float()


def drawn(count: int, seed: int, deviation: float = 0.5) -> torch.Tensor:
    return (gaussian(count, seed=seed).double() * deviation).exp()


def heavy(*shape: int, seed: int) -> torch.Tensor:
    """Student's t with three degrees of freedom: outliers as weights have them."""
    squares = torch.stack([gaussian(*shape, seed=1000 * seed + n).square() for n in range(3)])
    return gaussian(*shape, seed=seed) / squares.mean(0).sqrt()


@PROPERTY
@given(seed=st.integers(0, 2**20), shape=st.sampled_from(SHAPES), known=st.booleans())
def test_without_noise_they_are_exact(seed: int, shape: tuple[int, int], known: bool) -> None:
    weight = gaussian(*shape, seed=seed)
    c, a = drawn(shape[1], seed + 1), drawn(shape[0], seed + 2)
    quantized = (a[:, None] * weight.double() * c).float()
    columns, rows = fit(weight, quantized, c if known else None)
    if not known:  # one factor lies in either
        a /= a.median()
        columns = columns.over(c * columns.values.median() / c.median())
        assert columns.told() is None
    else:
        assert torch.allclose(columns.values, torch.ones_like(c), rtol=0.05)
        assert columns.told() is None
        assert torch.allclose(rows.values, a, rtol=0.05)


def test_errors_are_what_they_turn_out_to_be() -> None:
    """Their ratio to what is really off has a deviation of about one."""
    c, weight = drawn(512, 1), gaussian(512, 512)
    quantized = (weight.double() * c).float() + 0.2 * gaussian(512, 512, seed=2)
    columns, rows = fit(weight.clone(), quantized)
    for scales, true in ((columns, c), (rows, torch.ones(512, dtype=torch.float64))):
        off = (scales.values / true).log()
        off -= off.mean()  # one factor lies in either
        assert 0.7 < float((off / scales.errors).std()) < 1.4


@pytest.mark.parametrize("clip", [1.0, 0.8])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_alone_is_no_scale(shape: tuple[int, int], bits: int, clip: float) -> None:
    for seed in range(4):
        for weight in (gaussian(*shape, seed=seed), heavy(*shape, seed=seed)):
            columns, rows = fit(weight.clone(), rounded(weight, bits, clip))
            assert columns.told() is None
            assert rows.told() is None
            columns, rows = fit(weight.clone(), rounded(weight, bits, clip), columns.values * 0 + 1)
            assert columns.told() is None
            assert rows.told() is None


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_scales_that_are_there_are_told(bits: int) -> None:
    weight, s = gaussian(128, 128), drawn(128, 1, 0.3)
    made = rounded((weight.double() * s).float(), bits)
    columns, rows = fit(weight.clone(), made.clone())
    assert (columns.told(), rows.told()) != (None, None)
    assert rows.told() is None
    columns, rows = fit(weight.clone(), made.clone(), s)
    assert (columns.told(), rows.told()) == (None, None)
    once = s.clone()
    once[5] *= 3
    assert str(fit(weight.clone(), made.clone(), once)[0].told()).startswith("number 5 by 0.3")


@PROPERTY
@given(seed=st.integers(0, 2**20), bits=st.sampled_from([2, 3, 4]))
def test_a_counterpart_is_found_and_no_other_is(seed: int, bits: int) -> None:
    s = drawn(96, seed)
    first, second = gaussian(96, 128, seed=seed + 1), gaussian(128, 96, seed=seed + 2)
    up, down = first.double() / s[:, None], second.double() * s
    _, rows = fit(first.clone(), rounded(up.float(), bits))
    columns, _ = fit(second.clone(), rounded(down.float(), bits))
    found = counterpart(columns, rows)
    assert found is not None
    alike, estimated = found
    assert alike > 0.8
    known = estimated.known
    off = (estimated.values / s).log()[known]
    assert (off - off.median()).abs().median() < {2: 0.2, 3: 0.05, 4: 0.02}[bits]
    _, others = fit(first.clone(), rounded(first, bits))
    assert counterpart(columns, others) is None
    plain, _ = fit(second.clone(), rounded(second, bits))
    assert counterpart(plain, rows) is None


def test_nothing_is_told_of_zeros() -> None:
    columns, rows = fit(torch.zeros(64, 64), torch.zeros(64, 64))
    assert not columns.known.any()
    assert (columns.told(), rows.told()) == (None, None)
    weight = gaussian(64, 64)
    columns, _ = fit(weight, gaussian(64, 64, seed=9))
    assert columns.told() == "by what is not to be told from noise"
