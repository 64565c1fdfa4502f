"""What holds for every quantizer: decoding, pieces, odd shapes, hostile values, better scales."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from loftq_cli.errors import ScaleRangeError
from loftq_cli.numerics.quantizers.blocks import Parameters, block_count
from loftq_cli.numerics.quantizers.methods import make_quantizer
from tests.support import textbook
from tests.support.quantizing import (
    METHODS,
    SCALED_METHODS,
    SEARCHES,
    WIDTHS,
    fit,
    gaussian,
    prepared,
    quantizer_of,
    squared_error,
)
from tests.support.synthetic import llm_like

SHAPES = [(8, 128), (7, 100), (1, 300), (300, 1), (1, 1), (3, 33), (16, 48), (33, 64), (5, 7)]
BLOCK_SIZES = (32, 64, 128, 256)
every_method = pytest.mark.parametrize("method", METHODS)
every_scale = pytest.mark.parametrize("scale", ["absmax", *SEARCHES])


# -- decoding, shapes, pieces ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_method
@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_decode_is_what_fit_returned(shape, method, scale):
    weight = gaussian(*shape)
    for bits, block_size in itertools.product(WIDTHS, BLOCK_SIZES):
        quantizer = prepared(quantizer_of(method, bits, block_size, scale), weight)
        fitted = quantizer.fit(weight, None)
        quantized = quantizer.assemble(fitted.codes, fitted.parameters)
        assert quantized.shape == shape
        assert quantized.bits == bits
        assert fitted.codes.dtype == torch.uint8
        assert int(fitted.codes.max()) < 2**bits
        assert torch.equal(quantized.decode(), fitted.values)
        if method in ("uniform", "uniform-symmetric"):
            assert quantized.scales.numel() == shape[0] * block_count(shape[1], block_size)
        elif method != "uniform-tensor":
            assert quantized.scales.numel() == block_count(weight.numel(), block_size)


@pytest.mark.parametrize("shape", [(96, 128), (48, 100), (200, 33), (50, 1), (9, 257)], ids=str)
@every_method
@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_fit_in_row_pieces_equals_fit_in_one(shape, method, scale):
    weight = llm_like(*shape)
    whole_quantizer = prepared(quantizer_of(method, 2, 64, scale), weight)
    whole = whole_quantizer.fit(weight, None)

    step = whole_quantizer.row_step(shape[1])
    pieces = list(weight.split(step * 2))
    quantizer = prepared(quantizer_of(method, 2, 64, scale), weight, step * 2)
    fitted = [quantizer.fit(piece, None) for piece in pieces]
    for index in range(len(pieces)):
        before = sum(part.parameters.scales.numel() for part in fitted[:index])
        if method != "uniform-tensor":
            assert quantizer.blocks_before(index * step * 2, shape[1]) == before
    joined = quantizer.assemble(
        torch.cat([part.codes for part in fitted]),
        Parameters.join([part.parameters for part in fitted]),
    )
    expected = whole_quantizer.assemble(whole.codes, whole.parameters)
    assert torch.equal(joined.codes, expected.codes)
    assert torch.equal(joined.scales, expected.scales)
    assert torch.equal(joined.decode(), whole.values)


def test_codebook_blocks_run_over_the_flattened_matrix_and_uniform_groups_along_rows():
    weight = torch.ones(2, 96)
    weight.view(-1)[64:128] = 7.0
    flattened = fit(make_quantizer("nf", 2, 64, "absmax"), weight)
    assert flattened.parameters.scales.tolist() == [1.0, 7.0, 1.0]
    grouped = fit(make_quantizer("uniform", 8, 64, "absmax"), weight)
    largest = grouped.parameters.scales * (255 - grouped.parameters.zeros.float())
    torch.testing.assert_close(largest, torch.tensor([1.0, 7.0, 7.0, 1.0]), rtol=1e-2, atol=0)


@every_method
@every_scale
def test_fit_leaves_its_input_alone(method, scale):
    weight = llm_like(64, 100)
    before = weight.clone()
    fit(quantizer_of(method, 2, 64, scale), weight)
    assert torch.equal(weight, before)


# -- values that break quantizers ------------------------------------------------------------------


def with_outlier(size: float) -> torch.Tensor:
    weight = gaussian(16, 128) * 0.02
    weight[3, 70] = size
    return weight


HOSTILE = {
    "zero": torch.zeros(16, 128),
    "zero-blocks": torch.cat([torch.zeros(8, 128), gaussian(8, 128)]),
    "constant": torch.full((16, 128), 0.3),
    "negative-constant": torch.full((16, 128), -0.3),
    "negative-zero": torch.full((16, 128), -0.0),
    "outlier": with_outlier(1e4),
    "negative-outlier": with_outlier(-1e4),
    "half-maxima": torch.where(gaussian(16, 128) > 0, 65504.0, -65504.0),
    "one-half-maximum": with_outlier(65504.0),
    "subnormal": gaussian(16, 128) * 1e-40,
    "smallest-subnormal": torch.where(gaussian(16, 128) > 0, 1e-45, 0.0),
    "large": gaussian(16, 128).clamp(-3, 3) * 1e37,
    "mixed-magnitudes": gaussian(16, 128) * 10.0 ** torch.arange(-40, 24, 0.5)[:128],
}
every_hostile = pytest.mark.parametrize("weight", HOSTILE.values(), ids=HOSTILE.keys())


@every_hostile
@every_scale
def test_hostile_values_stay_finite(weight, scale):
    for method, bits in itertools.product(METHODS, WIDTHS):
        fitted = fit(quantizer_of(method, bits, 64, scale), weight)
        assert bool(torch.isfinite(fitted.parameters.scales).all())
        assert bool(torch.isfinite(fitted.values).all())
        assert int(fitted.codes.max()) < 2**bits


@every_hostile
@every_scale
def test_hostile_values_err_by_no_more_than_half_the_widest_gap(weight, scale):
    """absmax: every element within a bound of its block's levels; mse: no worse in sum."""
    for method, bits in itertools.product(SCALED_METHODS, WIDTHS):
        gap = widest_gap(method, bits)
        values = fit(quantizer_of(method, bits, 64, scale), weight).values.double()
        reach = weight.double().view(-1, 64).abs().amax(dim=1, keepdim=True)
        bound = (gap * reach + 2e-45).expand(-1, 64).reshape_as(weight)
        error = (values - weight.double()).abs()
        if scale == "absmax":
            assert bool((error <= bound).all())
        assert float(error.square().sum()) <= float(bound.square().sum())


def widest_gap(method: str, bits: int) -> float:
    """The farthest that an element can be from its block's levels, over the largest magnitude."""
    if method == "uniform":  # a step spans at most 2 / (2^N - 1); the zero point shifts by half
        return 2 / (2**bits - 1) * 1.001
    levels = textbook.normal_float(bits, symmetric=method == "nf-symmetric")
    return float(levels.diff().max()) / 2 * 1.001


@pytest.mark.parametrize("method", ["nf", "nf-symmetric", "uniform", "uniform-tensor"])
@every_scale
@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 65504.0, 1e-40])
def test_constant_blocks_are_reproduced(method, scale, value):
    weight = torch.full((4, 128), value)
    values = fit(quantizer_of(method, 2, 64, scale), weight).values
    torch.testing.assert_close(values, weight, rtol=1e-6, atol=1e-45)


@every_scale
@pytest.mark.parametrize("method", SCALED_METHODS)
def test_an_outlier_spoils_only_its_own_block(method, scale):
    clean, spoiled = with_outlier(0.02), with_outlier(1e4)
    quantizer = quantizer_of(method, 2, 64, scale)
    a, b = fit(quantizer, clean).values.clone(), fit(quantizer, spoiled).values.clone()
    if method != "nf-symmetric":  # which has no zero: its large scale would cost the others more
        assert float(b[3, 70]) == pytest.approx(1e4, rel=1e-4)
    a[3, 64:], b[3, 64:] = 0, 0
    assert torch.equal(a, b)


@pytest.mark.parametrize("method", METHODS)
@every_scale
def test_subnormal_matrices_are_quantized_as_well_as_their_large_multiples(method, scale):
    weight = gaussian(16, 128) * 1e-40
    errors = [
        math.sqrt(squared_error(fit(quantizer_of(method, 2, 64, scale), w).values, w))
        / float(w.double().norm())
        for w in (weight, weight * 2.0**120)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


# -- portable scales ---------------------------------------------------------------------------


@every_scale
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("factor", [1e9, 1e-12], ids=["overflow", "underflow"])
def test_a_scale_that_float16_cannot_hold_is_refused(scale, bits, factor):
    weight = torch.cat([gaussian(4, 128), gaussian(1, 128) * factor])
    quantizer = quantizer_of("uniform", bits, 64, scale, portable=True)
    with pytest.raises(ScaleRangeError, match="float16"):
        quantizer.fit(weight, None)


@every_scale
def test_portable_scales_hold_zero_groups_and_float16_maxima(scale):
    weight = torch.cat([torch.zeros(1, 128), HOSTILE["half-maxima"]])
    fitted = fit(quantizer_of("uniform", 4, 64, scale, portable=True), weight)
    assert bool(torch.isfinite(fitted.values).all())
    assert not fitted.values[0].any()
    error = (fitted.values - weight).abs().amax()
    assert float(error) < 65504 / 7
