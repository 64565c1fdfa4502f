"""Properties of a decomposition: what is kept, what is stored, what is reproducible."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_cli.numerics.alternation import decompose
from loftq_cli.numerics.decomposition import Decomposition, Order, Procedure
from loftq_cli.numerics.quantizers.methods import make_quantizer
from tests.support.quantizing import (
    METHODS,
    PROPERTY,
    SCALES_HERE,
    WIDTHS,
    effective,
    fit,
    gaussian,
    quantizer_of,
    recomputed,
)
from tests.support.synthetic import llm_like

every_method = pytest.mark.parametrize("method", METHODS)
every_svd = pytest.mark.parametrize("svd", ["fast", "exact"])
every_order = pytest.mark.parametrize("order", ["quantize-first", "svd-first"])
NF2 = make_quantizer("nf", 2, 64, "mse")


# -- residuals and the kept iterate ----------------------------------------------------------------


@every_method
@every_svd
@every_order
def test_final_is_the_residual_of_what_is_returned(method, svd, order):
    weight = llm_like(96, 160)
    settings = Procedure(rank=8, iters=4, svd=svd, order=order)
    for bits, scale in itertools.product((2, 4), SCALES_HERE):
        d = decompose(weight, quantizer_of(method, bits, 64, scale), settings)
        assert d.final == pytest.approx(recomputed(d, weight), rel=1e-5)
        assert len(d.residuals) == 4
        assert d.final == d.residuals[d.step - 1] == min(d.residuals)


@every_svd
def test_every_residual_is_that_of_its_own_step(svd):
    weight = llm_like(128, 128)
    quantizer = make_quantizer("nf", 2, 64, "absmax")

    def after(iters: int) -> Decomposition:
        return decompose(weight, quantizer, Procedure(rank=16, iters=iters, svd=svd, keep="last"))

    residuals = after(5).residuals
    for step in range(1, 6):
        d = after(step)
        assert d.step == step
        assert d.final == d.residuals[-1] == pytest.approx(recomputed(d, weight), rel=1e-5)
        assert d.final == pytest.approx(residuals[step - 1], rel=1e-6)


def test_an_earlier_iterate_is_kept_when_it_is_better():
    weight = llm_like(256, 256)
    quantizer = make_quantizer("nf", 2, 64, "absmax")
    best = decompose(weight, quantizer, Procedure(rank=32, iters=8))
    last = decompose(weight, quantizer, Procedure(rank=32, iters=8, keep="last"))
    assert best.residuals == last.residuals
    assert 1 < best.step < 8
    assert best.final == min(best.residuals) < last.final == last.residuals[-1]
    assert best.final == pytest.approx(recomputed(best, weight), rel=1e-5)
    assert last.final == pytest.approx(recomputed(last, weight), rel=1e-5)


@PROPERTY
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 99),
    rank=st.integers(1, 12),
    iters=st.integers(1, 4),
    method=st.sampled_from(METHODS),
    bits=st.sampled_from(WIDTHS),
    scale=st.sampled_from(SCALES_HERE),
    svd=st.sampled_from(["fast", "exact"]),
    skew=st.sampled_from([1, 3]),
)
def test_the_adapter_never_makes_it_worse_and_the_best_iterate_is_kept(
    shape, seed, rank, iters, method, bits, scale, svd, skew
):
    weight = gaussian(*shape, seed=seed) ** skew
    quantizer = quantizer_of(method, bits, 32, scale)
    d = decompose(weight, quantizer, Procedure(rank=rank, iters=iters, svd=svd))
    plain = float((fit(quantizer, weight).values.double() - weight.double()).norm())
    rounding = 1e-6 * d.weight_norm
    assert d.quantized_norm == pytest.approx(plain, rel=1e-5, abs=rounding)
    assert d.final <= d.quantized_norm * (1 + 1e-6) + rounding
    assert d.final == min(d.residuals) == d.residuals[d.step - 1]
    assert d.final == pytest.approx(recomputed(d, weight), rel=1e-5, abs=rounding)


@pytest.mark.parametrize("shape", [(1024, 1100), (1, 600_000), (600_000, 1)], ids=str)
def test_a_matrix_of_many_pieces_is_quantized_like_one_of_one_piece(shape):
    weight = gaussian(*shape) * 0.02
    d = decompose(weight, NF2, Procedure(rank=4, iters=1))
    whole = fit(NF2, weight)
    assert torch.equal(d.quantized.codes, whole.codes)
    assert torch.equal(d.quantized.scales, whole.parameters.scales)
    two = decompose(weight, NF2, Procedure(rank=4, iters=2))
    for result in (d, two):
        assert result.final == pytest.approx(recomputed(result, weight), rel=1e-5, abs=1e-5)


def test_svd_first_ends_lower_on_an_llm_like_matrix():
    weight = llm_like(256, 256)
    finals = [
        decompose(weight, NF2, Procedure(rank=32, iters=5, order=order)).final
        for order in ("svd-first", "quantize-first")
    ]
    assert finals[0] < 0.95 * finals[1]


# -- no steps: LoRA's own start --------------------------------------------------------------------


@every_method
def test_without_steps_it_is_plain_quantization(method):
    weight = llm_like(64, 128)
    quantizer = make_quantizer(method, 2, 64, "mse")
    d = decompose(weight, quantizer, Procedure(rank=16, iters=0))
    assert torch.equal(d.backbone(), fit(quantizer, weight).values)
    assert not d.lora_B.any()
    assert d.step == 0
    assert d.residuals == []
    assert d.final == d.quantized_norm == pytest.approx(recomputed(d, weight), rel=1e-6)


def test_without_steps_a_is_kaiming_uniform():
    d = decompose(llm_like(8, 400), NF2, Procedure(rank=64, iters=0))
    bound = (6 / ((1 + 5) * 400)) ** 0.5  # kaiming_uniform_ with a = sqrt(5), fan_in 400
    assert d.lora_A.shape == (64, 400)
    assert 0.999 * bound < float(d.lora_A.abs().max()) <= bound
    assert float(d.lora_A.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert float(d.lora_A.mean()) == pytest.approx(0, abs=0.02 * bound)


def test_the_drawn_a_depends_on_seed_and_name_only():
    def drawn(seed: int, name: str, scale: float = 1.0) -> torch.Tensor:
        weight = scale * gaussian(8, 64)
        return decompose(weight, NF2, Procedure(rank=4, iters=0, seed=seed, name=name)).lora_A

    assert torch.equal(drawn(0, "a"), drawn(0, "a", scale=2.0))
    assert not torch.equal(drawn(0, "a"), drawn(0, "b"))
    assert not torch.equal(drawn(0, "a"), drawn(1, "a"))


# -- degenerate matrices ---------------------------------------------------------------------------

DEGENERATE = {
    "zero": torch.zeros(48, 64),
    "constant": torch.full((48, 64), 0.3),
    "one-row": gaussian(1, 64),
    "one-column": gaussian(48, 1),
    "one-element": torch.full((1, 1), 0.7),
    "narrow": gaussian(6, 64),
    "tall": gaussian(64, 6),
    "rank-one": gaussian(48, 1) @ gaussian(1, 64, seed=1),
    "tiny": gaussian(48, 64) * 1e-16,
    "one-entry": torch.zeros(48, 64).index_put(
        (torch.tensor(5), torch.tensor(9)), torch.tensor(1e4)
    ),
}
every_degenerate = pytest.mark.parametrize("weight", DEGENERATE.values(), ids=DEGENERATE.keys())


@every_degenerate
@every_svd
@pytest.mark.parametrize("iters", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_direction_of_the_adapter_can_train(weight, svd, iters, dtype):
    rank, bound = 10, weight.shape[1] ** -0.5
    orders: tuple[Order, ...] = ("quantize-first", "svd-first")
    methods = ("nf", "nf-symmetric", "uniform")
    for order, method in itertools.product(orders, methods):
        settings = Procedure(rank=rank, iters=iters, svd=svd, order=order, adapter_dtype=dtype)
        d = decompose(weight, make_quantizer(method, 2, 64, "mse"), settings)
        assert d.lora_A.shape == (rank, weight.shape[1])
        assert d.lora_B.shape == (weight.shape[0], rank)
        assert d.lora_A.dtype == d.lora_B.dtype == dtype
        dead_B = (d.lora_B == 0).all(dim=0)
        assert not bool((dead_B & (d.lora_A == 0).all(dim=1)).any())
        drawn = d.lora_A[min(rank, *weight.shape) :]
        assert bool(dead_B[min(rank, *weight.shape) :].all())
        assert bool((drawn.float().abs() <= bound * 1.01).all())
        assert d.final == pytest.approx(recomputed(d, weight), rel=1e-4, abs=1e-6 * d.weight_norm)
        assert d.final <= d.quantized_norm * 1.00001 + 1e-6 * d.weight_norm or order == "svd-first"


@pytest.mark.parametrize("method", ["nf", "nf-symmetric", "uniform"])
@every_svd
def test_a_zero_matrix_stays_zero(method, svd):
    d = decompose(
        torch.zeros(32, 64),
        make_quantizer(method, 2, 64, "mse"),
        Procedure(rank=4, iters=3, svd=svd),
    )
    assert not d.backbone().any()
    assert not d.lora_B.any()
    assert d.residuals == [0, 0, 0]
    assert d.weight_norm == d.quantized_norm == d.final == 0


@every_svd
@pytest.mark.parametrize("iters", [1, 3])
def test_directions_beyond_the_rank_of_the_residual_start_like_loras(svd, iters):
    weight = gaussian(1, 64).repeat(48, 1)  # equal rows quantize alike: a residual of rank one
    d = decompose(weight, NF2, Procedure(rank=8, iters=iters, svd=svd))
    assert d.final < 1e-4 * d.quantized_norm
    assert bool(d.lora_B[:, 0].any())
    assert not d.lora_B[:, 1:].any()
    drawn, bound = d.lora_A[1:], 64**-0.5
    assert 0.9 * bound < float(drawn.abs().max()) <= bound
    assert float(drawn.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


@every_svd
def test_a_rank_of_the_smaller_side_leaves_no_residual(svd):
    weight = gaussian(6, 200)
    d = decompose(weight, NF2, Procedure(rank=9, iters=2, svd=svd))
    assert d.final < 1e-5 * d.weight_norm < d.quantized_norm


@every_svd
@every_method
def test_one_outlier_does_no_harm_outside_its_block(svd, method):
    weight = gaussian(64, 128) * 0.02
    weight[3, 70] = 1e4
    d = decompose(weight, make_quantizer(method, 2, 64, "mse"), Procedure(rank=8, iters=3, svd=svd))
    assert bool(torch.isfinite(effective(d)).all())
    assert d.final <= d.quantized_norm * 1.00001
