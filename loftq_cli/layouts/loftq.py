"""Layout ``loftq``: any codebook and width, packed. Normative text: docs/output-format.md.

``X.weight`` uint8 (ceil(out*in*bits/8),), the bit stream of
:mod:`loftq_cli.checkpoint.packing` over the row-major codes; ``X.weight_scales``
(blocks,), float32, bfloat16, or int8 with ``X.weight_scale_steps`` bfloat16 (ceil(blocks/64),).
With a codebook: ``X.weight_levels`` float32 (2**bits,), blocks run over the flattened matrix. With
zero points: ``X.weight_zeros`` uint8, the packed zero points, one per scale; groups run along
in_features, row by row. With the trellis code, whose levels are the format's, neither; blocks run
as with a codebook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loftq_cli.checkpoint.dtypes import tag_named
from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.checkpoint.packing import pack, packed_length
from loftq_cli.layouts.base import Layout, Matrix, Surroundings
from loftq_cli.numerics.quantizers import trellis_code
from loftq_cli.numerics.quantizers.blocks import Quantized, block_count
from loftq_cli.numerics.quantizers.decoding import decode
from loftq_cli.numerics.quantizers.methods import method
from loftq_cli.numerics.quantizers.packed import Packed
from loftq_cli.numerics.quantizers.scale_storage import (
    STEP_GROUP,
    ScaleDtype,
    pack_scales,
    unpack_scales,
)

FORMAT_VERSION = 1


class PackedLayout(Layout):
    """Everything the quantizers can produce, at its own width. ``scales``: how scales are stored;
    those that :meth:`encode` is given must be rounded to it already."""

    name = "loftq"
    imports = ("transformers", "peft", "loftq_cli")
    scale_dtypes = ("float32", "bfloat16", "int8")
    settings = ("scale_dtype",)
    holds_everything = True
    holds_experts = True

    def __init__(self, scales: ScaleDtype = "float32") -> None:
        self.scale_dtype: ScaleDtype = scales

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> PackedLayout:
        # A manifest from before there was the choice does not name it.
        return cls(recipe.get("scale_dtype", "float32"))

    def specs(self, matrix: Matrix) -> list[TensorSpec]:
        decoding = method(matrix.method).decoding
        scales = scale_count(matrix.shape, stored_block_size(matrix), decoding)
        specs = [
            TensorSpec(matrix.name, "U8", (packed_length(matrix.elements, matrix.bits),)),
            TensorSpec(f"{matrix.name}_scales", tag_named(self.scale_dtype), (scales,)),
        ]
        if self.scale_dtype == "int8":
            shape = (block_count(scales, STEP_GROUP),)
            specs.append(TensorSpec(f"{matrix.name}_scale_steps", "BF16", shape))
        if decoding == "affine":
            length = packed_length(scales, matrix.bits)
            return [*specs, TensorSpec(f"{matrix.name}_zeros", "U8", (length,))]
        if decoding == "codebook":
            specs.append(TensorSpec(f"{matrix.name}_levels", "F32", (2**matrix.bits,)))
        return specs

    def encode(self, matrix: Matrix, quantized: Quantized) -> dict[str, torch.Tensor]:
        scales, steps = pack_scales(quantized.scales, self.scale_dtype)
        tensors = {
            matrix.name: pack(quantized.codes, quantized.bits),
            f"{matrix.name}_scales": scales,
        }
        if steps is not None:
            tensors[f"{matrix.name}_scale_steps"] = steps
        if quantized.zeros is not None:
            tensors[f"{matrix.name}_zeros"] = pack(quantized.zeros, quantized.bits)
        if quantized.levels is not None and not quantized.is_trellis:
            tensors[f"{matrix.name}_levels"] = quantized.levels
        return tensors

    def packed(self, matrix: Matrix, tensors: Mapping[str, torch.Tensor]) -> Packed:
        steps = tensors.get(f"{matrix.name}_scale_steps")
        codes = tensors[matrix.name]
        levels = tensors.get(f"{matrix.name}_levels")
        if method(matrix.method).decoding == "trellis":
            levels = trellis_code.levels(codes.device)
        return Packed(
            matrix.shape,
            matrix.bits,
            stored_block_size(matrix),
            codes,
            unpack_scales(tensors[f"{matrix.name}_scales"], steps),
            tensors.get(f"{matrix.name}_zeros"),
            levels,
        )

    def quantized(self, matrix: Matrix, tensors: Mapping[str, torch.Tensor]) -> Quantized:
        return self.packed(matrix, tensors).unpacked()

    def decode(self, matrix: Matrix, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return decode(self.packed(matrix, tensors))

    def quantization_config(
        self, matrices: Sequence[Matrix], surroundings: Surroundings
    ) -> dict[str, Any]:
        stored = {} if self.scale_dtype == "float32" else {"scales": self.scale_dtype}

        def kind(matrix: Matrix) -> dict[str, str]:
            return {} if matrix.kind == "linear" else {"kind": matrix.kind}

        return {
            "quant_method": "loftq",
            "format_version": FORMAT_VERSION,
            "modules": {
                matrix.module: {
                    "bits": matrix.bits,
                    "block_size": stored_block_size(matrix),
                    "decoding": method(matrix.method).decoding,
                    **stored,
                    **kind(matrix),
                }
                for matrix in matrices
            },
        }


def stored_block_size(matrix: Matrix) -> int:
    """The block size that decoding uses: 0, one block for everything, if the method has one
    scale."""
    return 0 if method(matrix.method).one_scale else matrix.block_size


def scale_count(shape: tuple[int, int], block_size: int, kind: str) -> int:
    """Number of scales of a matrix (out, in)."""
    if kind == "affine":
        return shape[0] * block_count(shape[1], block_size)
    return block_count(shape[0] * shape[1], block_size)


LAYOUT = PackedLayout
