"""Each quantizer against a plain statement of what it is to compute.

Codes are compared through the distance of the decoded value to its element: where two levels are
equally near to within rounding, either is right.
"""

from __future__ import annotations

import pytest
import torch

from loftq_cli.numerics.quantizers.blocks import block_count
from loftq_cli.numerics.quantizers.methods import make_quantizer
from tests.support import textbook
from tests.support.quantizing import SEARCHES, WIDTHS, best_possible, fit, gaussian, quantizer_of
from tests.support.synthetic import llm_like

WEIGHTS = {
    "gaussian": gaussian(64, 256),
    "llm-like": llm_like(128, 192),
    "shifted": gaussian(64, 256) * 0.02 + 0.005,
}
every_weight = pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
every_width = pytest.mark.parametrize("bits", WIDTHS)


def assert_nearest(values: torch.Tensor, weight: torch.Tensor, levels: torch.Tensor) -> None:
    """Every value is one of its element's ``levels`` (last dimension), and the nearest."""
    slack = 1e-6 * levels.double().abs().amax(dim=-1)
    distance = (values.double() - weight.double()).abs()
    assert bool((distance <= best_possible(weight, levels) + slack).all())
    assert bool((best_possible(values, levels) <= slack).all())


# -- codebooks -----------------------------------------------------------------------------------


@every_weight
@every_width
@pytest.mark.parametrize("symmetric", [False, True])
def test_normal_float_absmax_is_the_largest_magnitude_times_the_nearest_level(
    weight, bits, symmetric
):
    method = "nf-symmetric" if symmetric else "nf"
    fitted = fit(make_quantizer(method, bits, 64, "absmax"), weight)
    blocks = weight.reshape(-1, 64)
    assert torch.equal(fitted.parameters.scales, blocks.abs().amax(dim=1))
    levels = textbook.normal_float(bits, symmetric)
    scaled = fitted.parameters.scales.double()[:, None, None] * levels
    assert_nearest(fitted.values.view(-1, 64), blocks, scaled)


@every_weight
@every_width
def test_normal_float_absmax_has_the_textbook_error(weight, bits):
    values = fit(make_quantizer("nf", bits, 64, "absmax"), weight).values
    expected = textbook.quantize_absmax(weight.double(), textbook.normal_float(bits), 64)
    error, textbook_error = (values - weight).double().norm(), (expected - weight).norm()
    torch.testing.assert_close(error, textbook_error, rtol=1e-6, atol=0)


@every_weight
@every_width
def test_uniform_block_is_the_loftq_authors_formula(weight, bits):
    fitted = fit(make_quantizer("uniform-block", bits, 64, "absmax"), weight)
    blocks = weight.double().reshape(-1, 64)
    scales = blocks.mean(dim=1) + 2.5 * blocks.std(dim=1)
    torch.testing.assert_close(fitted.parameters.scales.double(), scales, rtol=1e-5, atol=0)
    levels = torch.linspace(-1, 1, 2**bits, dtype=torch.float64)
    scaled = fitted.parameters.scales.double()[:, None, None] * levels
    assert_nearest(fitted.values.view(-1, 64), blocks, scaled)


@every_width
def test_uniform_block_of_values_whose_squares_overflow(bits):
    weight = gaussian(8, 64)
    near = fit(make_quantizer("uniform-block", bits, 64, "absmax"), weight)
    far = fit(make_quantizer("uniform-block", bits, 64, "absmax"), weight * 2.0**100)
    assert torch.equal(far.codes, near.codes)
    assert torch.equal(far.parameters.scales, near.parameters.scales * 2.0**100)


@every_weight
@every_width
def test_uniform_tensor_is_min_max_after_clipping_to_two_deviations(weight, bits):
    values = fit(make_quantizer("uniform-tensor", bits, 64, "absmax"), weight).values
    levels = textbook.uniform_tensor_levels(weight.double(), bits)
    clipped = weight.double().clamp(levels[0], levels[-1])
    assert_nearest(values, clipped, levels)


def test_uniform_tensor_keeps_a_range_within_two_deviations():
    weight = torch.tensor([[-1.0, 1.0, -1.0, 1.0, 0.25, -0.25, 0.4, -0.4]])
    values = fit(make_quantizer("uniform-tensor", 2, 64, "absmax"), weight).values
    third = 1 / 3
    expected = torch.tensor([[-1, 1, -1, 1, third, -third, third, -third]])
    torch.testing.assert_close(values, expected)


# -- uniform with an integer zero point ------------------------------------------------------------


def min_max(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and unrounded zero point of the asymmetric min-max quantizer (GPTQ's find_params)."""
    low = groups.double().amin(dim=1).clamp(max=0)
    high = groups.double().amax(dim=1).clamp(min=0)
    scales = (high - low) / (2**bits - 1)
    return scales, -low / scales


@every_weight
@every_width
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_uniform_absmax_is_the_min_max_quantizer(weight, bits, block_size):
    columns = weight.shape[1] // block_size * block_size
    weight = weight[:, :columns].contiguous()
    groups = weight.view(-1, block_size)
    fitted = fit(make_quantizer("uniform", bits, block_size, "absmax"), weight)
    expected_scales, position = min_max(groups, bits)
    clear = ((position % 1 - 0.5).abs() > 1e-4) & (position > 0.5)
    assert int(clear.sum()) > 0.9 * len(groups)
    scales, zeros = fitted.parameters.scales, fitted.parameters.zeros
    torch.testing.assert_close(scales[clear].double(), expected_scales[clear], rtol=1e-6, atol=0)
    assert torch.equal(zeros[clear].double(), position[clear].round())
    offsets = torch.arange(2**bits) - zeros[:, None].double()
    levels = (offsets * scales[:, None].double())[:, None, :]
    assert_nearest(fitted.values.view(-1, block_size), groups, levels)


@every_width
@pytest.mark.parametrize("low", [0.0, 1e-3])
def test_uniform_never_uses_zero_point_0_and_keeps_the_range(bits, low):
    weight = torch.rand(16, 64, generator=torch.Generator().manual_seed(0))
    weight[:, 0], weight[:, 1] = -low, 1.0
    fitted = fit(make_quantizer("uniform", bits, 64, "absmax"), weight)
    assert int(fitted.parameters.zeros.min()) >= 1
    half_a_step = fitted.parameters.scales[:, None] * 0.5
    assert bool(((fitted.values - weight).abs() <= half_a_step * 1.0001).all())


@every_width
@pytest.mark.parametrize("scale", ["absmax", "mse"])
@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_uniform_zero_points_and_codes_stay_in_range(bits, scale, sign):
    weight = gaussian(64, 100)
    if sign:
        weight = weight.abs() * sign
    fitted = fit(make_quantizer("uniform", bits, 32, scale), weight)
    zeros, codes = fitted.parameters.zeros, fitted.codes
    assert zeros.dtype == codes.dtype == torch.uint8
    assert 1 <= int(zeros.min()) <= int(zeros.max()) <= 2**bits - 1
    assert int(codes.max()) <= 2**bits - 1


@every_width
@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_uniform_decodes_from_the_portable_scale(bits, scale):
    weight = llm_like(64, 192)
    fitted = fit(make_quantizer("uniform", bits, 64, scale, portable=True), weight)
    scales, zeros = fitted.parameters.scales, fitted.parameters.zeros
    assert torch.equal(scales, scales.half().float())
    assert torch.equal(scales, scales.bfloat16().float())
    assert scales.numel() == zeros.numel() == 64 * block_count(192, 64)
    offsets = torch.arange(2**bits) - zeros[:, None].double()
    levels = (offsets * scales[:, None].double())[:, None, :]
    assert_nearest(fitted.values.view(-1, 64), weight.view(-1, 64), levels)


# -- symmetric: the zero point in the middle, a scale of either sign -------------------------------


def best_symmetric(block: torch.Tensor, bits: int) -> float:
    """The least squared error of float64 ``block`` at any scale, by a fine search."""
    zero = 2 ** (bits - 1)
    scales = torch.linspace(0.05, 1.3, 2501, dtype=torch.float64) * float(block.abs().max()) / zero
    scales = torch.cat([scales, -scales])[:, None]
    codes = (block / scales).round().clamp(-zero, zero - 1)
    return float((block - codes * scales).square().sum(dim=1).min())


@every_width
@pytest.mark.parametrize("scale", ["absmax", *SEARCHES])
def test_symmetric_codes_are_the_nearest_around_a_zero_point_in_the_middle(bits, scale):
    weight = llm_like(64, 192)
    fitted = fit(quantizer_of("uniform-symmetric", bits, 64, scale), weight)
    scales, zeros = fitted.parameters.scales, fitted.parameters.zeros
    assert set(zeros.tolist()) == {2 ** (bits - 1)}
    assert 0.2 < float((scales < 0).float().mean()) < 0.8
    levels = torch.arange(2**bits) - 2 ** (bits - 1)
    stored = (levels * scales[:, None].double())[:, None, :]
    assert_nearest(fitted.values.view(-1, 64), weight.view(-1, 64), stored)


@every_width
def test_symmetric_absmax_keeps_the_range_at_the_smaller_step(bits):
    weight = torch.cat([gaussian(8, 64), gaussian(8, 64).abs(), -gaussian(8, 64).abs()])
    scales = fit(quantizer_of("uniform-symmetric", bits, 64, "absmax"), weight).parameters.scales
    below, above = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    low, high = weight.amin(1).clamp(max=0).double(), weight.amax(1).clamp(min=0).double()
    upright = torch.maximum(-low / below, high / above)
    mirrored = torch.maximum(high / below, -low / above)
    expected = torch.where(mirrored < upright, -mirrored, upright)
    torch.testing.assert_close(scales.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("scale", SEARCHES)
def test_symmetric_scales_are_near_the_best_there_is(bits, scale):
    weight = llm_like(32, 64)
    fitted = fit(quantizer_of("uniform-symmetric", bits, 64, scale), weight)
    best = sum(best_symmetric(row, bits) for row in weight.double())
    assert float((fitted.values - weight).double().square().sum()) < 1.02 * best


@every_width
@pytest.mark.parametrize("scale", SEARCHES)
def test_a_matrix_of_the_other_sign_has_the_same_codes_and_scales_of_the_other_sign(bits, scale):
    weight = llm_like(32, 128)
    quantizer = quantizer_of("uniform-symmetric", bits, 64, scale)
    one, other = fit(quantizer, weight), fit(quantizer, -weight)
    same = one.parameters.scales == -other.parameters.scales
    assert float(same.float().mean()) > 0.95  # ties between the signs aside
    assert torch.equal(one.values[same.view(32, 2).all(1)], -other.values[same.view(32, 2).all(1)])
