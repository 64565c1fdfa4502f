"""The pair for a quantization that is given, beside the textbook's best one and EoRA's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_cli.errors import InputError
from loftq_cli.numerics.decomposition import Procedure
from loftq_cli.numerics.given import adapt
from loftq_cli.numerics.weighting import make_weighting
from tests.support.quantizing import PROPERTY, gaussian


def rounded(weight: torch.Tensor, bits: int = 3) -> torch.Tensor:
    """Round to nearest, a scale a row."""
    most = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(dim=1, keepdim=True) / most
    return (weight / scale).round().clamp(-most, most) * scale


def second_moments(features: int, seed: int = 1) -> torch.Tensor:
    """Full ones, of inputs some of which are far larger than others."""
    inputs = gaussian(4 * features, features, seed=seed) * torch.logspace(0, 2, features)
    return inputs.T @ inputs / len(inputs)


def eora(lost: torch.Tensor, moments: torch.Tensor, rank: int) -> torch.Tensor:
    """B A of EoRA (arXiv:2410.21271, algorithm 1) in float64: the truncated SVD of the error in
    the eigenspace of the inputs' covariance, each direction as large as its eigenvalue's root."""
    values, vectors = torch.linalg.eigh(moments.double())
    there = vectors * values.clamp_min(0).sqrt()
    back = (vectors / values.clamp_min(0).sqrt()).T
    left, sigma, right = torch.linalg.svd(lost.double() @ there, full_matrices=False)
    return left[:, :rank] * sigma[:rank] @ right[:rank] @ back


def norm(residual: torch.Tensor, moments: torch.Tensor) -> float:
    return float((residual @ moments.double() * residual).sum().sqrt())


def procedure(rank: int, **more: Any) -> Procedure:
    return Procedure(rank=rank, iters=1, **more)


@PROPERTY
@given(
    rows=st.integers(8, 96),
    columns=st.integers(8, 96),
    rank=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_nothing_of_that_rank_is_nearer(rows: int, columns: int, rank: int, seed: int) -> None:
    weight = gaussian(rows, columns, seed=seed)
    held = rounded(weight)
    found = adapt(weight, held.clone(), procedure(rank))
    sigma = torch.linalg.svdvals((weight - held).double())
    best = float(sigma[rank:].square().sum().sqrt())
    assert found.frobenius.quantized == pytest.approx(float((weight - held).norm()), rel=1e-5)
    assert best <= found.frobenius.final * (1 + 1e-5)
    assert found.frobenius.final <= best * 1.001 + 1e-5 * found.frobenius.weight
    left = weight.double() - held.double() - found.lora_B.double() @ found.lora_A.double()
    assert found.frobenius.final == pytest.approx(float(left.norm()), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("svd", ["fast", "exact"])
def test_under_full_moments_it_leaves_what_eora_does(svd: str) -> None:
    weight, moments = gaussian(128, 160), second_moments(160)
    held = rounded(weight)
    weighting = make_weighting(moments.clone(), torch.float32)
    found = adapt(weight, held.clone(), procedure(16, svd=svd), weighting)
    lost = (weight - held).double()
    textbook = norm(lost - eora(weight - held, moments, 16), moments)
    ours = norm(lost - found.lora_B.double() @ found.lora_A.double(), moments)
    assert found.weighted is not None
    assert ours == pytest.approx(textbook, rel=2e-3)
    assert ours == pytest.approx(found.weighted.final, rel=1e-3)
    plain = adapt(weight, held.clone(), procedure(16, svd=svd))
    assert ours < norm(lost - plain.lora_B.double() @ plain.lora_A.double(), moments)


@pytest.mark.gptq
@pytest.mark.filterwarnings("ignore")  # theirs
def test_the_textbook_s_eora_is_gptqmodel_s() -> None:
    theirs = pytest.importorskip("gptqmodel.eora.eora")
    weight, moments = gaussian(48, 64), second_moments(64)
    lost = weight - rounded(weight)
    lora_A, lora_B = theirs.eora_compute_lora(
        lost, "a matrix", moments, 8, torch.float32, torch.device("cpu")
    )
    expected = eora(lost, moments, 8)
    assert float((lora_B.double() @ lora_A.double() - expected).norm()) < 1e-3 * expected.norm()


def test_a_scaling_is_folded_out_of_b() -> None:
    weight = gaussian(64, 80)
    held = rounded(weight)
    plain = adapt(weight, held.clone(), procedure(8))
    scaled = adapt(weight, held.clone(), procedure(8, scaling=4.0))
    assert torch.allclose(scaled.lora_B * 4, plain.lora_B, atol=1e-6)
    assert scaled.frobenius.final == pytest.approx(plain.frobenius.final, rel=1e-6)


def test_what_is_equal_has_nothing_to_correct_and_an_adapter_that_trains() -> None:
    weight = gaussian(32, 48)
    found = adapt(weight, weight.clone(), procedure(4))
    assert (found.frobenius.quantized, found.frobenius.final) == (0.0, 0.0)
    assert not found.lora_B.any()
    assert found.lora_A.any(dim=1).all()


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (gaussian(64, 64, seed=5), "no quantization of it"),
        (-gaussian(64, 64), "no quantization of it"),
        (gaussian(64, 64) * float("nan"), "not finite"),
    ],
)
def test_a_backbone_of_something_else_is_refused(held: torch.Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        adapt(gaussian(64, 64), held.clone(), procedure(4))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_no_quantization_is_too_coarse_to_be_known(bits: int) -> None:
    weight = gaussian(64, 256)
    mean = weight.abs().mean(dim=1, keepdim=True)
    held = weight.sign() * mean if bits == 1 else rounded(weight, bits)
    assert adapt(weight, held, procedure(4)).frobenius.final > 0
