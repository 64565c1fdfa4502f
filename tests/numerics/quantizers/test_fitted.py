"""Levels fitted to the matrix."""

from __future__ import annotations

import pytest
import torch

from loftq_cli.numerics.alternation import decompose
from loftq_cli.numerics.decomposition import Procedure
from loftq_cli.numerics.quantizers.methods import make_quantizer
from tests.support.quantizing import (
    SEARCHES,
    fit,
    gaussian,
    quantizer_of,
    recomputed,
    squared_error,
)
from tests.support.synthetic import llm_like

every_search = pytest.mark.parametrize("scale", SEARCHES)


def lloyd_max(values: torch.Tensor, count: int) -> torch.Tensor:
    """The textbook: levels are the means of the cells between their midpoints, float64."""
    levels = torch.quantile(values, (torch.arange(count) + 0.5).double() / count)
    for _ in range(3000):
        cell = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)
        sums = torch.zeros(count, dtype=torch.float64).index_add_(0, cell, values)
        before, levels = levels, sums / torch.bincount(cell, minlength=count)
        if torch.equal(levels, before):
            break
    return levels


@every_search
@pytest.mark.parametrize(("bits", "gain"), [(2, 0.05), (3, 0.03), (4, 0.01)])
def test_fitted_levels_beat_normal_float(scale, bits, gain):
    weight = llm_like(256, 512)
    settings = Procedure(rank=16, iters=5)
    plain, ours = (
        decompose(weight, quantizer_of(method, bits, 64, scale), settings)
        for method in ("nf", "fitted")
    )
    assert ours.final < (1 - gain) * plain.final
    assert ours.final == pytest.approx(recomputed(ours, weight), rel=1e-5)


@every_search
def test_weights_on_few_levels_are_found(scale):
    levels = torch.tensor([-0.8, -0.1, 0.35, 1.0])
    codes = torch.randint(4, (64, 128), generator=torch.Generator().manual_seed(0))
    scales = 0.5 + torch.rand((64, 4, 1), generator=torch.Generator().manual_seed(1))
    weight = (levels[codes].view(64, 4, 32) * scales).view(64, 128)
    fitted = fit(quantizer_of("fitted", 2, 32, scale), weight)
    assert squared_error(fitted.values, weight) < 1e-9 * squared_error(weight, 0 * weight)


def test_blocks_with_one_scale_come_close_to_lloyd_and_max():
    """Long Gaussian blocks have nearly the same scale, so the optimum is the scalar quantizer's."""
    weight = gaussian(64, 4096).float()
    fitted = fit(quantizer_of("fitted", 2, 256, "mse"), weight)
    levels = lloyd_max(weight.double().reshape(-1), 4)
    nearest = levels[(weight.double()[..., None] - levels).abs().argmin(dim=-1)]
    best = float((weight.double() - nearest).square().sum())
    # A scale per block can only lower the error, by what blocks of 256 differ.
    assert 0.9 * best < squared_error(fitted.values, weight) < 1.005 * best


@every_search
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(4, 128),
        torch.full((4, 128), 0.3),
        torch.eye(8),
        gaussian(1, 5),
        gaussian(3, 65),
        gaussian(16, 128) * 1e30,
        gaussian(16, 128) * 1e-30,
        gaussian(4, 128).masked_fill(torch.arange(128) > 0, 0),
    ],
    ids=["zero", "constant", "eye", "five", "odd", "huge", "tiny", "sparse"],
)
def test_degenerate_matrices_fall_back_to_normal_float(scale, weight):
    for bits in (2, 3, 4):
        plain, ours = (
            fit(quantizer_of(method, bits, 32, scale), weight) for method in ("nf", "fitted")
        )
        assert bool(torch.isfinite(ours.values).all())
        energy = squared_error(weight, 0 * weight)
        assert squared_error(ours.values, weight) <= (
            1.05 * squared_error(plain.values, weight) + 1e-6 * energy
        )


@every_search
def test_levels_are_stored_in_ascending_order_with_magnitude_one(scale):
    weight = llm_like(64, 256)
    d = decompose(weight, quantizer_of("fitted", 3, 64, scale), Procedure(rank=4, iters=3))
    levels = d.quantized.levels
    assert levels is not None
    assert bool((levels.diff() > 0).all())
    assert float(levels.abs().max()) == 1.0


def test_the_same_bytes_again():
    weight, settings = llm_like(64, 256), Procedure(rank=4, iters=3)
    quantizer = make_quantizer("fitted", 2, 64, "fixed", native=True)
    first, second = (decompose(weight, quantizer, settings) for _ in range(2))
    assert torch.equal(first.quantized.codes, second.quantized.codes)
    assert torch.equal(first.quantized.scales, second.quantized.scales)


def test_a_method_without_a_rule_for_its_scales_is_refused():
    with pytest.raises(ValueError, match="needs a rule"):
        make_quantizer("nf", 2, 64, "fixed")
