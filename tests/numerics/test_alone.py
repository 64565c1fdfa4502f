"""Quantization without an adapter, against the method as its paper states it."""

from __future__ import annotations

import pytest
import torch

from loftq_cli.numerics.alone import quantize
from loftq_cli.numerics.decomposition import Procedure
from loftq_cli.numerics.quantizers.methods import make_quantizer
from loftq_cli.numerics.weighting import make_weighting
from tests.support import textbook
from tests.support.quantizing import gaussian

ROWS, COLUMNS, GROUP = 24, 64, 32


def moments() -> torch.Tensor:
    """E[x x^T] of inputs with a few large directions."""
    inputs = gaussian(400, COLUMNS, seed=1) @ gaussian(COLUMNS, COLUMNS, seed=2)
    return inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("method", ["uniform", "uniform-symmetric"])
def test_codes_are_those_of_gptq_at_the_same_scales(method: str, bits: int) -> None:
    """With a ridge of a tenth of the mean moment; columns with the largest moments come first."""
    weight, H = gaussian(ROWS, COLUMNS, seed=3), moments()
    quantizer = make_quantizer(method, bits, GROUP, "mse", False)
    procedure = Procedure(rank=0, iters=0, feedback=True)
    found = quantize(weight, quantizer, procedure, make_weighting(H.clone(), torch.float32))
    scales = found.quantized.scales.view(ROWS, -1).double()
    assert found.quantized.zeros is not None
    zeros = found.quantized.zeros.view(ROWS, -1).double()

    def nearest(values: torch.Tensor, column: int) -> torch.Tensor:
        scale, zero = scales[:, column // GROUP], zeros[:, column // GROUP]
        return (values / scale + zero).round().clamp(0, 2**bits - 1).sub(zero) * scale

    ridged = H.double() + 0.1 * H.double().diagonal().mean() * torch.eye(COLUMNS)
    order = H.diagonal().argsort(stable=True).tolist()[::-1]
    expected = textbook.gptq(weight, ridged, order, nearest)
    same = (found.backbone().double() - expected).abs() < 1e-5
    assert same.float().mean() > 0.99  # a value in the middle of two may fall either way


def test_feedback_that_does_not_help_is_not_kept() -> None:
    """Inputs that have nothing to do with one another: nothing can be made up for."""
    weight = gaussian(ROWS, COLUMNS, seed=3)
    quantizer = make_quantizer("uniform", 3, GROUP, "mse", False)
    weighting = make_weighting(torch.eye(COLUMNS), torch.float32)
    fed, plain = (
        quantize(weight, quantizer, Procedure(rank=0, iters=0, feedback=feedback), weighting)
        for feedback in (True, False)
    )
    assert torch.equal(fed.quantized.codes, plain.quantized.codes)
    assert fed.frobenius == plain.frobenius
    assert fed.frobenius.final == fed.frobenius.quantized


def test_norms_are_those_of_the_values() -> None:
    weight, H = gaussian(ROWS, COLUMNS, seed=3), moments()
    quantizer = make_quantizer("nf", 4, GROUP, "mse", False)
    procedure = Procedure(rank=0, iters=0, feedback=True)
    found = quantize(weight, quantizer, procedure, make_weighting(H.clone(), torch.float32))
    error = (weight - found.backbone()).double()
    assert found.frobenius.final == pytest.approx(float(error.norm()), rel=1e-5)
    assert found.weighted is not None
    expected = float((error @ H.double() * error).sum().sqrt())
    assert found.weighted.final == pytest.approx(expected, rel=1e-5)
    assert found.weighted.final < 0.9 * found.weighted.quantized
    assert (found.lora_A.shape, found.lora_B.shape) == ((0, COLUMNS), (ROWS, 0))
