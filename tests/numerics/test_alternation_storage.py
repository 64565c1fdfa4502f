"""What is stored: dtypes, folded scaling, determinism, row order, and values that do not fit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from loftq_cli.errors import InputError, ScaleRangeError
from loftq_cli.numerics.alternation import decompose
from loftq_cli.numerics.decomposition import Adapted, Decomposition, Norms, Procedure
from loftq_cli.numerics.quantizers.methods import make_quantizer
from loftq_cli.numerics.quantizers.portable import is_portable
from tests.support.quantizing import METHODS, effective, fit, gaussian, recomputed
from tests.support.synthetic import llm_like

every_method = pytest.mark.parametrize("method", METHODS)
every_svd = pytest.mark.parametrize("svd", ["fast", "exact"])
NF2 = make_quantizer("nf", 2, 64, "mse")


# -- lora_alpha / r --------------------------------------------------------------------------------


@every_svd
@pytest.mark.parametrize("scaling", [0.25, 2.0, 0.3, 5.0])
def test_scaling_is_folded_out_of_b(svd, scaling):
    weight = llm_like(96, 128)
    plain = decompose(weight, NF2, Procedure(rank=8, iters=1, svd=svd))
    folded = decompose(weight, NF2, Procedure(rank=8, iters=1, svd=svd, scaling=scaling))
    assert folded.scaling == scaling
    assert torch.equal(folded.quantized.codes, plain.quantized.codes)
    torch.testing.assert_close(folded.lora_A, plain.lora_A)
    torch.testing.assert_close(folded.lora_B * scaling, plain.lora_B)
    assert folded.final == pytest.approx(recomputed(folded, weight), rel=1e-5)


@pytest.mark.parametrize("scaling", [0.25, 0.3])
def test_scaling_changes_nothing_in_later_steps(scaling):
    weight = llm_like(96, 128)
    plain = decompose(weight, NF2, Procedure(rank=8, iters=4))
    folded = decompose(weight, NF2, Procedure(rank=8, iters=4, scaling=scaling))
    assert folded.residuals == pytest.approx(plain.residuals, rel=1e-4)
    assert folded.final == pytest.approx(recomputed(folded, weight), rel=1e-5)


# -- dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("order", ["quantize-first", "svd-first"])
@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_residuals_are_of_the_rounded_adapter(dtype, order, scaling):
    weight = rank_deficient_plus_noise()
    settings = Procedure(rank=32, iters=3, order=order, adapter_dtype=dtype, scaling=scaling)
    d = decompose(weight, NF2, settings)
    assert d.lora_A.dtype == d.lora_B.dtype == dtype
    assert d.final == d.residuals[d.step - 1] == min(d.residuals)
    assert d.final == pytest.approx(recomputed(d, weight), rel=1e-5)


def test_rounding_the_adapter_shows_in_the_residual():
    weight = gaussian(16, 128)
    finals = [
        decompose(weight, NF2, Procedure(rank=16, iters=1, adapter_dtype=dtype)).final
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ]
    assert finals[0] < 0.1 * finals[1] < 0.5 * finals[2]


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("iters", [0, 3])
def test_residuals_are_of_the_rounded_backbone(method, dtype, iters):
    weight = llm_like(96, 128)
    settings = Procedure(rank=8, iters=iters, backbone_dtype=dtype)
    d = decompose(weight, make_quantizer(method, 4, 64, "mse"), settings)
    backbone = d.backbone()
    assert backbone.dtype == torch.float32
    assert torch.equal(backbone, backbone.to(dtype).float())
    assert torch.equal(backbone, d.quantized.decode().to(dtype).float())
    assert d.final == pytest.approx(recomputed(d, weight), rel=1e-5)
    plain = fit(make_quantizer(method, 4, 64, "mse"), weight).values.to(dtype).double()
    assert d.quantized_norm == pytest.approx(float((weight - plain).norm()), rel=1e-5)


def test_portable_scales_are_stored_and_measured():
    weight = llm_like(96, 128)
    quantizer = make_quantizer("uniform", 2, 64, "mse", portable=True)
    d = decompose(weight, quantizer, Procedure(rank=8, iters=3))
    assert is_portable(d.quantized.scales)
    assert d.final == pytest.approx(recomputed(d, weight), rel=1e-5)


def rank_deficient_plus_noise() -> torch.Tensor:
    return gaussian(96, 4) @ gaussian(4, 128, seed=1) + 0.1 * gaussian(96, 128, seed=2)


# -- determinism, aliasing, row order --------------------------------------------------------------


def tensors(d: Decomposition) -> list[torch.Tensor]:
    zeros = [] if d.quantized.zeros is None else [d.quantized.zeros]
    return [d.quantized.codes, d.quantized.scales, *zeros, d.lora_A, d.lora_B]


@every_method
@every_svd
@pytest.mark.parametrize("order", ["quantize-first", "svd-first"])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_input_gives_the_same_bytes(request, method, svd, order, threads):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    weight = llm_like(96, 128)
    settings = Procedure(rank=8, iters=3, svd=svd, order=order, seed=3, name="layer.0")
    quantizer = make_quantizer(method, 2, 64, "mse")
    first = decompose(weight, quantizer, settings)
    torch.manual_seed(1)  # the global generator must not matter
    second = decompose(weight.clone(), quantizer, settings)
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))
    assert first.residuals == second.residuals


@every_method
@every_svd
@pytest.mark.parametrize("iters", [0, 1, 3])
def test_the_weight_is_left_alone(method, svd, iters):
    weight = llm_like(64, 100)
    before = weight.clone()
    for order in ("quantize-first", "svd-first"):
        settings = Procedure(rank=8, iters=iters, svd=svd, order=order)
        decompose(weight, make_quantizer(method, 2, 64, "absmax"), settings)
    assert torch.equal(weight, before)


def test_a_transposed_view_decomposes_like_its_copy():
    view = llm_like(128, 96).T
    settings = Procedure(rank=8, iters=2)
    first, second = decompose(view, NF2, settings), decompose(view.contiguous(), NF2, settings)
    assert torch.equal(first.quantized.codes, second.quantized.codes)
    assert first.residuals == pytest.approx(second.residuals, rel=1e-5)


@pytest.mark.parametrize("method", ["nf", "nf-symmetric", "uniform-block", "uniform"])
@every_svd
@pytest.mark.parametrize("scale", ["mse", "absmax"])
def test_permuting_rows_permutes_the_result(method, svd, scale):
    weight = llm_like(96, 128)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    quantizer = make_quantizer(method, 2, 64, scale)
    settings = Procedure(rank=8, iters=1, svd=svd)
    plain, permuted = (decompose(w, quantizer, settings) for w in (weight, weight[order]))
    assert torch.equal(permuted.quantized.codes, plain.quantized.codes[order])
    assert torch.equal(permuted.backbone(), plain.backbone()[order])
    difference = effective(permuted) - effective(plain)[order]
    # The fast SVD's random start is not permuted: its result differs as far as it is from exact.
    assert float(difference.norm()) < (1e-3 if svd == "exact" else 2e-2) * plain.final


@every_svd
def test_permuting_rows_permutes_the_result_of_several_steps(svd):
    weight = llm_like(96, 128)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    settings = Procedure(rank=8, iters=4, svd=svd)
    plain, permuted = (decompose(w, NF2, settings) for w in (weight, weight[order]))
    assert permuted.residuals == pytest.approx(plain.residuals, rel=3e-3)
    same = (permuted.quantized.codes == plain.quantized.codes[order]).float().mean()
    assert float(same) > (0.99 if svd == "exact" else 0.95)  # a step chooses among near equals


# -- values that do not fit ------------------------------------------------------------------------


@every_method
@every_svd
@pytest.mark.parametrize("order", ["quantize-first", "svd-first"])
def test_values_too_large_for_float32_products_are_refused(method, svd, order):
    weight = gaussian(48, 64).clamp(-3, 3) * 1e38
    settings = Procedure(rank=4, iters=2, svd=svd, order=order)
    with pytest.raises(InputError, match="too large for float32"):
        decompose(weight, make_quantizer(method, 2, 64, "mse"), settings)


@every_svd
@pytest.mark.parametrize(("factor", "scaling"), [(1e12, 1.0), (1.0, 1e-6)])
def test_an_adapter_that_float16_cannot_hold_is_refused(svd, factor, scaling):
    settings = Procedure(rank=4, iters=1, svd=svd, adapter_dtype=torch.float16, scaling=scaling)
    with pytest.raises(InputError, match="adapter is too large for float16"):
        decompose(gaussian(48, 64) * factor, NF2, settings)


@every_svd
@pytest.mark.parametrize("iters", [0, 1])
def test_a_backbone_that_float16_cannot_hold_is_refused(svd, iters):
    settings = Procedure(rank=4, iters=iters, svd=svd, backbone_dtype=torch.float16)
    with pytest.raises(InputError, match="quantized matrix is too large for float16"):
        decompose(gaussian(48, 64) * 1e6, NF2, settings)


@pytest.mark.parametrize("factor", [1e9, 1e-12])
def test_scales_that_float16_cannot_hold_are_refused(factor):
    quantizer = make_quantizer("uniform", 2, 64, "mse", portable=True)
    with pytest.raises(ScaleRangeError):
        decompose(gaussian(48, 64) * factor, quantizer, Procedure(rank=4, iters=1))


@every_method
@every_svd
@pytest.mark.parametrize("factor", [1e-40, 1e-30, 1e-15, 1e15, 1e30])
def test_magnitude_does_not_change_how_well_it_goes(method, svd, factor):
    weight = llm_like(48, 64) * 50
    settings = Procedure(rank=4, iters=2, svd=svd)
    quantizer = make_quantizer(method, 2, 64, "mse")
    scaled = weight * factor
    plain, extreme = decompose(weight, quantizer, settings), decompose(scaled, quantizer, settings)
    assert extreme.weight_norm == pytest.approx(float(scaled.double().norm()), rel=1e-6)
    assert extreme.final == pytest.approx(recomputed(extreme, scaled), rel=1e-5, abs=1e-43)
    ratio = plain.final / plain.weight_norm
    assert extreme.final / extreme.weight_norm == pytest.approx(ratio, rel=0.02)


@every_method
@every_svd
def test_weights_of_a_few_subnormal_steps_decompose(method, svd):
    weight = llm_like(48, 64) * 1e-42
    quantizer = make_quantizer(method, 2, 64, "mse")
    d = decompose(weight, quantizer, Procedure(rank=4, iters=2, svd=svd))
    assert 0 < d.weight_norm == pytest.approx(float(weight.double().norm()), rel=1e-6)
    assert d.final == pytest.approx(recomputed(d, weight), abs=1e-43)
    assert d.final <= d.quantized_norm < d.weight_norm


def test_float16_maxima_decompose():
    weight = torch.where(gaussian(48, 64) > 0, 65504.0, -65504.0)
    weight[0] = gaussian(64)
    settings = Procedure(rank=4, iters=3, adapter_dtype=torch.float16)
    d = decompose(weight, make_quantizer("nf", 4, 64, "mse"), settings)
    assert bool(torch.isfinite(effective(d)).all())
    assert d.final == pytest.approx(recomputed(d, weight), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_an_error(norm):
    nothing = torch.zeros(1, 1)
    sound = Norms(1.0, 1.0, [0.5], 0.5)
    for plain, weighted in (
        (Norms(1.0, 1.0, [norm], 0.5), None),
        (sound, replace(sound, weight=norm)),
    ):
        with pytest.raises(InputError, match="a norm of the residual is too large for float32"):
            Adapted(nothing, nothing, 1, plain, weighted, 1.0)
