"""What several tests of the numerics share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings

from loftq_cli.kernels import native
from loftq_cli.numerics.alternation import make_sweep
from loftq_cli.numerics.decomposition import Decomposition, Procedure
from loftq_cli.numerics.quantizers.base import Quantizer
from loftq_cli.numerics.quantizers.blocks import Fitted, Parameters
from loftq_cli.numerics.quantizers.methods import make_quantizer

PROPERTY = settings(max_examples=60)

CODEBOOK_METHODS = ("nf", "nf-symmetric", "uniform-block")
METHODS = (*CODEBOOK_METHODS, "uniform", "uniform-symmetric", "uniform-tensor")
# Those that can search for scales.
SCALED_METHODS = ("nf", "nf-symmetric", "uniform", "uniform-symmetric")
WIDTHS = (2, 3, 4, 8)

needs_kernels = pytest.mark.skipif(not native.available(), reason="no compiled kernels here")
SCALES_HERE = ("absmax", "mse", *(["mse-native"] if native.available() else []))
SEARCHES = ("mse", pytest.param("mse-native", marks=needs_kernels))


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer_of(
    method: str, bits: int, block_size: int, scale: str, portable: bool = False
) -> Quantizer:
    """A quantizer; scale "mse-native" is "mse" searched by the compiled kernels."""
    search: Any
    search, _, kernels = scale.partition("-")
    return make_quantizer(method, bits, block_size, search, portable, native=kernels == "native")


def prepared(quantizer: Quantizer, weight: torch.Tensor, step: int | None = None) -> Quantizer:
    """The quantizer for one matrix, which it sees in ranges of ``step`` rows."""
    rows = range(0, len(weight), step or len(weight))
    pieces = [slice(start, min(start + rows.step, len(weight))) for start in rows]
    return quantizer.prepare(
        pieces, lambda piece: weight[piece], lambda quantizer, *given: quantizer.fit(*given)
    )


def fit(quantizer: Quantizer, weight: torch.Tensor, start: Parameters | None = None) -> Fitted:
    """Quantize a whole matrix, by the compiled kernels where the quantizer may use them."""
    sweep = make_sweep(weight, quantizer, Procedure(rank=1, iters=0))
    quantized = sweep.quantize(start, None).quantized
    parameters = Parameters(quantized.scales, quantized.zeros)
    return Fitted(quantized.codes, parameters, quantized.decode())


def squared_error(values: torch.Tensor, weight: torch.Tensor) -> float:
    return float((values.double() - weight.double()).square().sum())


def best_possible(weight: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Distance of every element to the nearest of the levels in the last dimension, float64."""
    return (weight.double()[..., None] - levels.double()).abs().amin(dim=-1)


def effective(d: Decomposition) -> torch.Tensor:
    """What a consumer computes with, in float64: Q + scaling B A."""
    return d.backbone().double() + d.scaling * d.lora_B.double() @ d.lora_A.double()


def recomputed(d: Decomposition, weight: torch.Tensor) -> float:
    """The residual of what was returned, in float64."""
    return float((weight.double() - effective(d)).norm())
