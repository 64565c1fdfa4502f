"""The norm ||.||_H and the low-rank step that minimises it, against float64 and the full SVD."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from loftq_cli.numerics import alternation, lora, lowrank, passes, trace
from loftq_cli.numerics.alternation import decompose
from loftq_cli.numerics.decomposition import Procedure
from loftq_cli.numerics.quantizers.methods import make_quantizer
from loftq_cli.numerics.weighting import make_weighting
from tests.support.quantizing import effective, gaussian, recomputed
from tests.support.synthetic import llm_like

KINDS = ("diagonal", "full")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=str)


def moments(kind: str, width: int, tokens: int = 2000) -> torch.Tensor:
    """Of inputs as a language model has them: correlated, of very different sizes, with a mean, two
    massive channels and one that is never used."""
    mixed = gaussian(tokens, width, seed=3) @ (gaussian(width, width, seed=4) / width**0.5)
    inputs = mixed * (0.8 * gaussian(width, seed=5)).exp() + 0.5 * gaussian(width, seed=6)
    inputs[:, [1, 7]] *= 50
    inputs[:, 11] = 0
    if kind == "diagonal":
        return inputs.double().square().mean(dim=0).float()
    return (inputs.double().T @ inputs.double() / tokens).float()


def dominated(width: int, times: float, seed: int) -> torch.Tensor:
    """Moments of inputs with a mean so many times their spread, as massive activations make it."""
    spread, mean = gaussian(2 * width, width, seed=seed), gaussian(width, seed=seed + 1)
    steady = 1 + 0.1 * gaussian(2 * width, 1, seed=seed + 2)
    inputs = (spread + times * mean * steady).double()
    return (inputs.T @ inputs / len(inputs)).float()


def norm(matrix: torch.Tensor, H: torch.Tensor) -> float:
    """||matrix||_H from the definition, tr(M H M^T), float64."""
    M, H = matrix.double(), (torch.diag(H) if H.dim() == 1 else H).double()
    return math.sqrt(float(((M @ H) * M).sum()))


def smallest_distance(matrix: torch.Tensor, H: torch.Tensor, rank: int) -> float:
    """Of any rank-r matrix in ||.||_H: what the SVD of M H^(1/2) leaves (Eckart-Young)."""
    values, vectors = torch.linalg.eigh((torch.diag(H) if H.dim() == 1 else H).double())
    root = vectors * values.clamp_min(0).sqrt()
    return float(torch.linalg.svdvals(matrix.double() @ root)[rank:].norm())


@every_kind
@pytest.mark.parametrize("width", [96, 1500, 640])  # the last in the kernel, where there is one
@every_dtype
def test_the_norm_is_that_of_its_definition(kind, width, products):
    H, matrix = moments(kind, width), gaussian(70, width)
    left, right = gaussian(70, 5, seed=1), gaussian(5, width, seed=2)
    weighting = make_weighting(H.clone(), products)
    tolerance = 1e-5 if products == torch.float32 else 2e-3
    assert weighting.norm(matrix) == pytest.approx(norm(matrix, H), rel=tolerance)
    assert weighting.norm(matrix.bfloat16()) == pytest.approx(
        norm(matrix.bfloat16(), H), rel=tolerance
    )
    expected = norm(matrix.double() + left.double() @ right.double(), H)
    alone, together = weighting.norms(matrix.to(products), left, right)
    assert alone == pytest.approx(norm(matrix, H), rel=tolerance)
    assert together == pytest.approx(expected, rel=tolerance)


@every_kind
@every_dtype
@pytest.mark.parametrize("power", [-100, 70, 120])
def test_norms_of_values_whose_squares_float32_cannot_hold(kind, products, power):
    weighting, matrix = make_weighting(moments(kind, 96), products), gaussian(40, 96)
    left, right = gaussian(40, 5, seed=1), gaussian(5, 96, seed=2)
    expected = weighting.norms(matrix.to(products), left, right)
    times = 2.0**power
    found = weighting.norms(matrix.to(products) * times, left * times, right)
    assert found == pytest.approx([norm * times for norm in expected], rel=1e-6)
    assert weighting.norm(matrix * times) == pytest.approx(weighting.norm(matrix) * times, rel=1e-6)
    least = weighting.norm(torch.full((40, 96), 1e-40))  # 2^-133, below float32's normal numbers
    assert least == pytest.approx(weighting.norm(torch.ones(40, 96)) * 1e-40, rel=1e-3)


@every_kind
@every_dtype
@pytest.mark.parametrize("shape", [(256, 192), (192, 256)], ids=str)
@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e8])
def test_the_fast_step_is_close_to_the_best_and_the_exact_one_is_it(kind, products, shape, factor):
    matrix, rank = llm_like(*shape), 16
    H = moments(kind, shape[1]) * factor
    best = smallest_distance(matrix, H, rank)
    weighting = make_weighting(H.clone(), products)
    exact = lowrank.exact(matrix, rank, weighting)
    assert norm(matrix - exact.B @ exact.A, H) <= 1.0005 * best
    generator = torch.Generator().manual_seed(0)
    fast = lowrank.subspace(
        matrix.to(products), float(matrix.norm()), rank, generator, None, weighting
    )
    assert norm(matrix - fast.B @ fast.A, H) <= 1.01 * best
    lengths = fast.A.norm(dim=1)
    torch.testing.assert_close(fast.B.norm(dim=0), lengths, rtol=1e-3, atol=1e-6)


@every_dtype
@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_first_fast_step_is_close_to_the_best_for_inputs_with_a_steep_spectrum(products, decay):
    """As those of attention in a language model's first blocks: few directions have nearly all of
    the energy, and what the others add is below a float32 Gram matrix's rounding after a pass."""
    rank, (rows, columns) = 64, (300, 320)
    axes = torch.linalg.qr(gaussian(columns, columns, seed=1).double()).Q
    energies = torch.arange(1.0, columns + 1, dtype=torch.float64) ** (-2 * decay)
    energies[0] *= 4
    H = ((axes * energies) @ axes.T).float()
    matrix = gaussian(rows, columns, seed=2)
    fast = lowrank.subspace(
        matrix.to(products),
        float(matrix.norm()),
        rank,
        torch.Generator().manual_seed(0),
        weighting=make_weighting(H.clone(), products),
    )
    found = norm(matrix.double() - fast.B.double() @ fast.A.double(), H)
    # bfloat16 rounds R, and the largest direction weights that too.
    tolerance = 1.003 if products == torch.float32 else 1.15
    assert found <= tolerance * smallest_distance(matrix, H, rank)


@every_kind
@every_dtype
@pytest.mark.parametrize("svd", ["fast", "exact"])
def test_the_alternation_minimises_and_reports_the_weighted_residual(kind, products, svd):
    weight, H = llm_like(256, 192), moments(kind, 192)
    quantizer = make_quantizer("nf", 2, 64, "mse", native=False)
    settings = Procedure(rank=16, iters=4, svd=svd, products=products)
    plain = decompose(weight, quantizer, settings)
    d = decompose(weight, quantizer, settings, make_weighting(H.clone(), products))
    assert plain.weighted is None
    assert d.weighted is not None
    tolerance = 1e-4 if products == torch.float32 else 2e-3
    final = norm(weight.double() - effective(d), H)
    assert d.weighted.final == d.weighted.steps[d.step - 1] == min(d.weighted.steps)
    assert d.weighted.final == pytest.approx(final, rel=tolerance)
    assert d.weighted.weight == pytest.approx(norm(weight, H), rel=tolerance)
    without = decompose(weight, quantizer, Procedure(rank=16, iters=0))
    assert d.weighted.quantized == pytest.approx(
        norm(weight - without.backbone(), H), rel=tolerance
    )
    assert d.final == pytest.approx(recomputed(d, weight), rel=1e-5)
    unweighted = norm(weight.double() - effective(plain), H)
    assert final < 0.9 * unweighted
    assert plain.final < d.final


def test_of_tall_matrices_the_first_step_and_the_last_are_exact_and_the_others_nearly():
    weight, H = llm_like(2048, 192), moments("full", 192)
    quantizer = make_quantizer("nf", 2, 64, "mse", native=False)
    every = [
        decompose(
            weight,
            quantizer,
            Procedure(rank=16, iters=iters, keep="last"),
            make_weighting(H.clone(), torch.float32),
        )
        for iters in (1, 2, 3, 4)
    ]
    exact = [norm(weight.double() - effective(d), H) for d in every]
    assert every[-1].weighted is not None
    steps = every[-1].weighted.steps
    assert [steps[0], steps[3]] == pytest.approx([exact[0], exact[3]], rel=1e-5)
    assert steps[1:3] == pytest.approx(exact[1:3], rel=5e-3)
    assert steps[1] != pytest.approx(exact[1], rel=1e-5)  # from a quarter of the rows


@pytest.mark.parametrize(
    ("method", "block_size"), [("nf", 48), ("uniform", 64), ("fitted", 64), ("uniform-tensor", 0)]
)
@pytest.mark.parametrize("spoilt", [[3, 5], [5]])
def test_what_is_kept_is_measured_and_not_estimated(monkeypatch, method, block_size, spoilt):
    """Steps whose adapter is halved are worse than the one before them."""
    weight, H = llm_like(1100, 96), moments("full", 96)
    settings = Procedure(rank=16, iters=5)
    calls: list[int] = []
    fit = lora.fit_adapter

    def halved(*args):
        calls.append(len(calls) + 1)
        A, B, basis = fit(*args)
        return A, B / 2 if calls[-1] in spoilt else B, basis

    monkeypatch.setattr(alternation, "fit_adapter", halved)
    quantizer = make_quantizer(method, 2, block_size, "mse", native=False)
    d = decompose(weight, quantizer, settings, make_weighting(H.clone(), torch.float32))
    assert d.weighted is not None
    assert d.step == 4
    final = norm(weight.double() - effective(d), H)
    assert d.weighted.final == d.weighted.steps[d.step - 1] == pytest.approx(final, rel=1e-5)
    assert d.weighted.final < d.weighted.steps[-1]


@pytest.mark.parametrize("feedback", ["kept", "worse", "overflown"])
@pytest.mark.parametrize("spoilt", [[], [5]])
def test_before_feedback_the_last_step_is_estimated_and_what_is_kept_is_not(
    monkeypatch, feedback, spoilt
):
    weight, H = llm_like(1100, 96), moments("full", 96)
    settings = Procedure(rank=16, iters=5, feedback=True)
    fit, fed_back = lora.fit_adapter, passes.fed_back
    calls: list[int] = []

    def halved(*args):
        calls.append(len(calls) + 1)
        A, B, basis = fit(*args)
        return A, B / 2 if calls[-1] in spoilt else B, basis

    def spoilt_feedback(*args):
        fed = fed_back(*args)
        return None if feedback == "overflown" else replace(fed, weighted=1e9)

    monkeypatch.setattr(alternation, "fit_adapter", halved)
    if feedback != "kept":
        monkeypatch.setattr(alternation, "fed_back", spoilt_feedback)
    quantizer = make_quantizer("uniform", 2, 64, "mse", native=False)
    d = decompose(weight, quantizer, settings, make_weighting(H.clone(), torch.float32))
    assert d.weighted is not None
    assert d.step == (4 if spoilt and feedback != "kept" else 5)
    final = norm(weight.double() - effective(d), H)
    assert d.weighted.final == d.weighted.steps[d.step - 1] == pytest.approx(final, rel=1e-5)


def test_an_estimate_that_was_too_low_decides_nothing(monkeypatch):
    weight, H = llm_like(1100, 96), moments("full", 96)
    quantizer = make_quantizer("nf", 2, 64, "mse", native=False)
    settings = Procedure(rank=16, iters=5)
    honest = decompose(weight, quantizer, settings, make_weighting(H.clone(), torch.float32))
    assert honest.weighted is not None
    assert honest.step == 5
    estimated = trace.WeightedTrace._sampled
    monkeypatch.setattr(
        trace.WeightedTrace,
        "_sampled",
        lambda self, *args: estimated(self, *args) * (0.1 if len(self.steps) == 2 else 1),
    )
    d = decompose(weight, quantizer, settings, make_weighting(H.clone(), torch.float32))
    assert d.weighted is not None
    assert (d.step, d.weighted.final) == (5, honest.weighted.final)
    assert d.weighted.steps == pytest.approx(honest.weighted.steps, rel=5e-3)


@every_kind
def test_without_steps_the_weighted_residual_is_the_quantization_s(kind):
    weight, H = llm_like(96, 128), moments(kind, 128)
    quantizer = make_quantizer("uniform", 3, 64, "mse", native=False)
    d = decompose(
        weight, quantizer, Procedure(rank=8, iters=0), make_weighting(H.clone(), torch.float32)
    )
    assert d.weighted is not None
    assert d.weighted.steps == []
    assert d.weighted.final == d.weighted.quantized
    assert d.weighted.final == pytest.approx(norm(weight - d.backbone(), H), rel=1e-5)


def test_moments_of_white_inputs_change_nothing_but_rounding():
    weight = llm_like(192, 128)
    quantizer = make_quantizer("nf", 2, 64, "mse", native=False)
    settings = Procedure(rank=16, iters=3)
    plain = decompose(weight, quantizer, settings)
    for H in (torch.full((128,), 4.0), 4.0 * torch.eye(128)):
        d = decompose(weight, quantizer, settings, make_weighting(H, torch.float32))
        assert d.weighted is not None
        assert d.weighted.final == pytest.approx(2 * d.final, rel=1e-5)
        assert d.final == pytest.approx(plain.final, rel=2e-3)


@pytest.mark.parametrize("width", [150, 192])  # the latter in the kernel, where there is one
def test_what_is_left_along_a_massive_direction_is_not_lost_in_bfloat16(width):
    """An adapter that takes nearly all of it, as they do: the rest has to be seen."""
    direction = torch.nn.functional.normalize(gaussian(width, seed=7), dim=0)
    H = moments("full", width, tokens=600) / 50 + 1e5 * torch.outer(direction, direction)
    matrix = gaussian(64, width)
    matrix -= torch.outer(matrix @ direction, direction) * 0.9999
    weighting = make_weighting(H.clone(), torch.bfloat16)
    given = matrix.bfloat16()
    assert weighting.norm(given) == pytest.approx(norm(given, H), rel=5e-3)


def test_a_step_with_massive_inputs_states_what_it_leaves_in_bfloat16():
    spread, mean = gaussian(400, 192, seed=1), 100 * gaussian(192, seed=2)
    inputs = (spread + mean * (1 + 0.1 * gaussian(400, 1, seed=3))).double()
    H = (inputs.T @ inputs / 400).float()
    weight = gaussian(96, 192) / 50
    settings = Procedure(rank=16, iters=5, products=torch.bfloat16)
    d = decompose(
        weight,
        make_quantizer("nf", 4, 64, "mse"),
        settings,
        make_weighting(H.clone(), torch.bfloat16),
    )
    assert d.weighted is not None
    assert d.step > 1
    assert d.weighted.final == pytest.approx(norm(weight.double() - effective(d), H), rel=0.03)


@pytest.mark.parametrize("times", [10, 100, 1000])
def test_inputs_with_a_large_mean_cost_nothing_in_bfloat16(times):
    """Rounding the moments, or the residual, made the adapter miss the one large direction."""
    weight, H = llm_like(128, 256), dominated(256, times, 5)
    quantizer = make_quantizer("nf", 2, 64, "mse")
    left = {}
    for products in (torch.float32, torch.bfloat16):
        settings = Procedure(rank=16, iters=4, momentum=True, products=products)
        d = decompose(weight, quantizer, settings, make_weighting(H.clone(), products))
        assert d.weighted is not None
        left[products] = norm(weight.double() - effective(d), H)
        # At 1000 times float32 moments hold their small directions to two digits.
        assert d.weighted.final == pytest.approx(left[products], rel=2e-3 if times < 1000 else 3e-2)
    assert left[torch.bfloat16] < (1.01 if times < 1000 else 1.03) * left[torch.float32]


def test_a_product_with_moments_keeps_large_directions_apart():
    H = dominated(256, 1000, 3)
    weighting = make_weighting(H.clone(), torch.bfloat16)
    axis = torch.linalg.eigh(H.double()).eigenvectors[:, -1:]
    rows = gaussian(20, 256).double()
    rows = (rows - 0.9999 * (rows @ axis) @ axis.T).float()  # nearly nothing of it is left
    expected = rows.double() @ weighting.moments.double()
    error = (weighting.times(rows) - expected).norm()
    rounded = (rows.bfloat16() @ weighting.narrow.T).double()
    assert error < 0.05 * expected.norm()
    assert error < 0.1 * (rounded - expected).norm()
