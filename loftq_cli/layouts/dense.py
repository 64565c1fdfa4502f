"""Layout ``dense``: Q written back in 16 or 32 bit, an ordinary checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from loftq_cli.checkpoint import dtypes
from loftq_cli.checkpoint.dtypes import torch_dtype
from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.families.kinds import turned
from loftq_cli.layouts.base import Layout, Matrix
from loftq_cli.numerics.quantizers.blocks import Quantized


class DenseLayout(Layout):
    """Q in ``dtype`` ("source": the dtype the matrix had, float32 if that was float64)."""

    name = "dense"
    imports = ("transformers", "peft")
    settings = ("dense_dtype",)
    holds_experts = True
    holds_values = True
    holds_codes = False
    keeps_conv1d = True

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> DenseLayout:
        return cls(recipe["dense_dtype"])

    def _tag(self, matrix: Matrix) -> str:
        return dtypes.resolve(self._dtype, matrix.dtype)

    def loaded_bytes(self, matrix: Matrix, bits: int) -> int:
        return matrix.elements * bits // 8

    def rounding(self, matrix: Matrix) -> torch.dtype | None:
        return torch_dtype(self._tag(matrix))

    def specs(self, matrix: Matrix) -> list[TensorSpec]:
        return [TensorSpec(matrix.name, self._tag(matrix), matrix.stored_shape)]

    def encode(self, matrix: Matrix, quantized: Quantized) -> dict[str, torch.Tensor]:
        return self.encode_values(matrix, quantized.decode())

    def encode_values(self, matrix: Matrix, values: torch.Tensor) -> dict[str, torch.Tensor]:
        dense = values.to(torch_dtype(self._tag(matrix)))
        return {matrix.name: turned(dense, matrix.kind).contiguous()}

    def decode(self, matrix: Matrix, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return turned(tensors[matrix.name].float(), matrix.kind).contiguous()


LAYOUT = DenseLayout
