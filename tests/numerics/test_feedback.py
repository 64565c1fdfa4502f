"""Error feedback under moments of which the adapter takes its part, against GPTQ in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from loftq_cli.errors import InputError
from loftq_cli.numerics import passes
from loftq_cli.numerics.alternation import decompose, make_sweep
from loftq_cli.numerics.decomposition import Procedure
from loftq_cli.numerics.feedback import make_feedback, requantize
from loftq_cli.numerics.left import Left
from loftq_cli.numerics.quantizers.blocks import Parameters, Quantized
from loftq_cli.numerics.quantizers.methods import make_quantizer
from loftq_cli.numerics.sweep import Product
from loftq_cli.numerics.weighting import make_weighting
from tests.numerics.test_weighting import dominated, moments, norm
from tests.support import textbook
from tests.support.quantizing import SEARCHES, effective, gaussian, quantizer_of, recomputed
from tests.support.synthetic import llm_like

OUT, IN, RANK = 48, 150, 8  # neither whole blocks nor whole panels
METHODS = ("nf", "uniform", "fitted", "uniform-block", "uniform-tensor")
every_method = pytest.mark.parametrize("method", METHODS)


def rest(H: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """What feedback works with, float64: H less nine tenths of what the rows of A take, and a ridge
    of a tenth of the mean."""
    H, A = H.double(), A.double()
    images = A @ H
    left = H - 0.9 * images.T @ torch.linalg.pinv(images @ A.T) @ images
    return left + 0.1 * left.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)


def levels_of(quantized: Quantized, row: int, column: int) -> torch.Tensor:
    """What an element may be, float64, from the format's definition."""
    size, columns = quantized.block_size, quantized.shape[1]
    if quantized.levels is not None:
        block = (row * columns + column) // size if size else 0
        return quantized.levels.double() * quantized.scales[block].double()
    block = row * -(-columns // size) + column // size
    codes = torch.arange(2**quantized.bits, dtype=torch.float64)
    assert quantized.zeros is not None
    return (codes - float(quantized.zeros[block])) * quantized.scales[block].double()


@every_method
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("search", SEARCHES)
def test_it_is_gptq_with_what_the_adapter_leaves_of_the_moments(method, bits, search):
    weight, H = llm_like(OUT, IN), moments("full", IN)
    left, right = gaussian(OUT, RANK, seed=1) / 50, gaussian(RANK, IN, seed=2) / 50
    quantizer = quantizer_of(method, bits, 32, "fixed" if "uniform-" in method else search)
    sweep = make_sweep(weight, quantizer, Procedure(rank=RANK, iters=1))
    product = Product(left, right)
    given = sweep.quantize(None, product).quantized
    weighting = make_weighting(H.clone(), torch.float32)
    feedback = make_feedback(Left.by(weighting, right))
    parameters = Parameters(given.scales, given.zeros)
    quantized, squared = requantize(sweep, weight, parameters, product, feedback, None)
    # The order is that of the moments that are left, the largest first.
    remaining = rest(H, right)
    order = list(reversed(feedback.order.tolist()))
    assert (remaining.diagonal()[order].diff() <= 1e-5 * remaining.diagonal().max()).all()

    def nearest(values: torch.Tensor, column: int) -> torch.Tensor:
        tables = torch.stack([levels_of(given, row, column) for row in range(OUT)])
        chosen = (values[:, None] - tables).abs().argmin(dim=1, keepdim=True)
        return tables.gather(1, chosen)[:, 0]

    target = weight.double() - left.double() @ right.double()
    expected = textbook.gptq(target, remaining, order, nearest)
    # One rounding at a boundary changes the rest of its row.
    same = torch.isclose(quantized.decode().double(), expected, rtol=1e-5, atol=1e-9).all(dim=1)
    assert same.sum() >= OUT - 2
    assert norm(target - quantized.decode(), remaining) == pytest.approx(
        norm(target - expected, remaining), rel=1e-3
    )
    residual = weight - quantized.decode()
    assert torch.allclose(sweep.residual, residual, atol=1e-7)
    assert squared == pytest.approx(float(residual.double().square().sum()), rel=1e-6)
    assert torch.equal(quantized.scales, given.scales)


def test_the_factor_takes_the_moments_apart():
    H, A = moments("full", IN), gaussian(RANK, IN)
    feedback = make_feedback(Left.by(make_weighting(H.clone(), torch.float32), 1e-12 * A))
    order, factor = feedback.order, feedback.factor.double()
    assert torch.equal(factor, factor.triu())
    assert torch.equal(factor.diagonal(), torch.ones(IN, dtype=torch.float64))
    # U^T D U = H' with D diagonal, so that U^-T H' U^-1 has to be.
    inner = torch.linalg.solve_triangular(factor.T, rest(H, A)[order][:, order], upper=False)
    inner = torch.linalg.solve_triangular(factor, inner, upper=True, left=False)
    scale = inner.diagonal().sqrt()
    assert (inner.diagonal() > 0).all()
    assert (inner / scale[:, None] / scale - torch.eye(IN)).abs().max() < 1e-3


@every_method
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("order", ["quantize-first", "svd-first"])
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=str)
def test_the_last_step_leaves_less_and_says_what(method, search, order, products):
    weight, H = llm_like(256, 192).bfloat16(), moments("full", 192)
    scale = "fixed" if "uniform-" in method else search
    quantizer = quantizer_of(method, 2, 64, scale)
    settings = Procedure(rank=16, iters=4, order=order, products=products, momentum=True)
    plain = decompose(weight, quantizer, settings, make_weighting(H.clone(), products))
    d = decompose(
        weight, quantizer, replace(settings, feedback=True), make_weighting(H.clone(), products)
    )
    assert plain.weighted is not None
    assert d.weighted is not None
    assert d.weighted.steps[:-1] == plain.weighted.steps[:-1]
    assert d.weighted.quantized == plain.weighted.quantized
    assert d.step == 4
    assert d.weighted.final < 0.95 * plain.weighted.final
    tolerance = 1e-4 if products == torch.float32 else 1e-2
    found = norm(weight.double() - effective(d), H)
    assert d.weighted.final == pytest.approx(found, rel=tolerance)
    assert d.final == pytest.approx(recomputed(d, weight), rel=1e-4)


@pytest.mark.parametrize("method", ["nf", "uniform"])
def test_the_residual_is_of_what_is_stored(method):
    """Dense values and scales are rounded before errors are fed back."""
    weight, H = llm_like(96, 100), moments("full", 100)
    quantizer = make_quantizer(method, 3, 32, "mse")
    stored = Procedure(rank=8, iters=2, feedback=True, adapter_dtype=torch.bfloat16)
    for settings in (
        replace(stored, backbone_dtype=torch.bfloat16),
        replace(stored, scale_dtype="bfloat16"),
        replace(stored, scale_dtype="int8"),
        replace(stored, scaling=2.0),
    ):
        d = decompose(weight, quantizer, settings, make_weighting(H.clone(), torch.float32))
        assert d.weighted is not None
        assert d.final == pytest.approx(recomputed(d, weight), rel=1e-5)
        found = norm(weight.double() - effective(d), H)
        assert d.weighted.final == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("order", ["quantize-first", "svd-first"])
def test_one_step_knows_what_quantization_alone_leaves(order):
    weight, H = llm_like(64, 96), moments("full", 96)
    quantizer = make_quantizer("nf", 2, 64, "mse")
    weighting = make_weighting(H.clone(), torch.float32)
    settings = Procedure(rank=8, iters=1, order=order, feedback=True)
    d = decompose(weight, quantizer, settings, weighting)
    alone = decompose(weight, quantizer, replace(settings, iters=0), weighting)
    assert d.weighted is not None
    assert alone.weighted is not None
    assert d.weighted.quantized == pytest.approx(alone.weighted.final, rel=1e-6)
    assert len(d.weighted.steps) == len(d.residuals) == 1


def test_without_full_moments_or_steps_nothing_is_fed_back():
    weight = llm_like(64, 96)
    quantizer = make_quantizer("nf", 2, 64, "mse")
    settings = Procedure(rank=8, iters=3)
    for weighting, iters in (
        (None, 3),
        (make_weighting(moments("diagonal", 96), torch.float32), 3),
        (make_weighting(moments("full", 96), torch.float32), 0),
    ):
        given = replace(settings, iters=iters)
        plain = decompose(weight, quantizer, given, weighting)
        d = decompose(weight, quantizer, replace(given, feedback=True), weighting)
        assert torch.equal(d.quantized.codes, plain.quantized.codes)
        assert torch.equal(d.lora_B, plain.lora_B)


def test_few_tokens_and_a_weight_of_zeros_do_no_harm():
    """Moments of rank three, an adapter that has more rows than the matrix has directions."""
    H = moments("full", 96, tokens=3)
    quantizer = make_quantizer("uniform", 2, 32, "mse")
    settings = Procedure(rank=24, iters=2, feedback=True)
    for weight in (llm_like(64, 96), torch.zeros(64, 96), llm_like(64, 96) * 1e-30):
        d = decompose(weight, quantizer, settings, make_weighting(H.clone(), torch.float32))
        assert torch.isfinite(effective(d)).all()
        assert d.final <= float(weight.double().norm()) * (1 + 1e-6)


def test_moments_that_are_none_are_an_error():
    H = torch.eye(96) - 0.5  # 47 below zero along one direction
    H = H + 0.5 * torch.eye(96)
    quantizer = make_quantizer("nf", 2, 64, "mse")
    settings = Procedure(rank=8, iters=1, feedback=True)
    with pytest.raises(InputError, match="not positive semidefinite") as caught:
        decompose(llm_like(64, 96), quantizer, settings, make_weighting(H, torch.float32))
    assert "measure them again" in caught.value.hint


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize(("method", "bits"), [("uniform", 2), ("nf", 4), ("uniform", 8)])
@pytest.mark.parametrize("iters", [1, 4])
@pytest.mark.parametrize("times", [0, 100, 1000])
def test_it_is_not_kept_where_it_leaves_more(keep, method, bits, iters, times):
    quantizer = make_quantizer(method, bits, 64, "mse")
    settings = Procedure(rank=8, iters=iters, momentum=True, keep=keep)
    better = 0
    for seed in range(0, 12, 3):
        weight, H = gaussian(64, 128, seed=seed) / 50, dominated(128, times, seed)
        weighting = make_weighting(H, torch.float32)
        plain = decompose(weight, quantizer, settings, weighting)
        d = decompose(weight, quantizer, replace(settings, feedback=True), weighting)
        assert d.weighted is not None
        assert plain.weighted is not None
        assert d.weighted.steps[-1] <= plain.weighted.steps[-1]
        assert d.weighted.final <= plain.weighted.final
        assert d.final == pytest.approx(recomputed(d, weight), rel=1e-5)
        better += d.weighted.steps[-1] < plain.weighted.steps[-1]
    assert better == 4 or times


def test_a_value_too_large_for_its_dtype_is_found_in_the_residual(monkeypatch):
    """Columns after the overflow would be quantized to no code at all."""
    weight, H = llm_like(8, 64) * 1e4, moments("full", 64)
    quantizer = make_quantizer("uniform-block", 3, 64, "fixed")
    sweep = make_sweep(weight, quantizer, Procedure(rank=2, iters=1))
    product = Product(torch.zeros(8, 2), gaussian(2, 64))
    given = sweep.quantize(None, product).quantized
    weighting = make_weighting(H, torch.float32)
    feedback = make_feedback(Left.by(weighting, product.right))
    huge = Parameters(torch.full_like(given.scales, 1e6), None)
    quantized, squared = requantize(sweep, weight, huge, product, feedback, torch.float16)
    assert not math.isfinite(squared)
    assert quantized.codes.max() < 8
    # And then the step stays what it was.
    settings = Procedure(rank=2, iters=1, backbone_dtype=torch.float16)
    plain = decompose(weight, quantizer, settings, weighting)
    monkeypatch.setattr(passes, "requantize", lambda *_: (quantized, math.inf))
    d = decompose(weight, quantizer, replace(settings, feedback=True), weighting)
    assert torch.equal(d.quantized.codes, plain.quantized.codes)
    assert d.weighted == plain.weighted
