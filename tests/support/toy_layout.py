"""A layout from outside the package: one byte a code, and what decodes it beside it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.layouts.base import Layout, Matrix
from loftq_cli.layouts.registry import register
from loftq_cli.numerics.quantizers.blocks import Quantized
from loftq_cli.numerics.quantizers.methods import method


@register
class ToyLayout(Layout):
    """``X.weight`` uint8 (out, in); ``X.weight.toy_scales`` float32 (blocks,);
    ``X.weight.toy_levels`` float32 (2**bits,)."""

    name = "toy-bytes"
    imports = ("transformers", "peft", "loftq_cli")

    def cannot_hold(self, matrix: Matrix) -> str | None:
        if method(matrix.method).decoding != "codebook":
            return f"bytes of levels, not of {matrix.method}"
        return None

    def specs(self, matrix: Matrix) -> list[TensorSpec]:
        blocks = -(-matrix.elements // matrix.block_size)
        return [
            TensorSpec(matrix.name, "U8", matrix.shape),
            TensorSpec(f"{matrix.name}.toy_scales", "F32", (blocks,)),
            TensorSpec(f"{matrix.name}.toy_levels", "F32", (2**matrix.bits,)),
        ]

    def encode(self, matrix: Matrix, quantized: Quantized) -> dict[str, torch.Tensor]:
        assert quantized.levels is not None
        return {
            matrix.name: quantized.codes,
            f"{matrix.name}.toy_scales": quantized.scales,
            f"{matrix.name}.toy_levels": quantized.levels,
        }

    def decode(self, matrix: Matrix, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scales = tensors[f"{matrix.name}.toy_scales"].repeat_interleave(matrix.block_size)
        values = tensors[f"{matrix.name}.toy_levels"][tensors[matrix.name].flatten().long()]
        return (values * scales[: matrix.elements]).view(matrix.shape)
