"""Layout ``bnb``: NF4 as bitsandbytes serialises it, loaded by stock transformers.

``X.weight`` uint8 (n/2, 1), the first of two elements in the high nibble; ``X.weight.absmax``
float32 (blocks,); ``X.weight.quant_map`` float32 (16,);
``X.weight.quant_state.bitsandbytes__nf4`` uint8, JSON with quant_type, blocksize, dtype, shape.
(bitsandbytes ``QuantState.as_dict(packed=True)``.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loftq_cli.checkpoint.dtypes import computed, name_of
from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.families.architecture import unreplaceable
from loftq_cli.layouts.base import Layout, Matrix, Surroundings
from loftq_cli.layouts.skipped import skip_list
from loftq_cli.numerics.quantizers.blocks import Quantized

_METHOD = "nf"


class BnbLayout(Layout):
    """bitsandbytes NF4, blocks of 64."""

    name = "bnb"
    imports = ("transformers", "peft", "accelerate", "bitsandbytes")
    mixes = False
    auto_rank = 1

    @classmethod
    def method_at(cls, bits: int) -> str | None:
        return _METHOD

    def suits(self, name: str, bits: int, surroundings: Surroundings) -> bool:
        return name == _METHOD and bits == 4

    def cannot_hold(self, matrix: Matrix) -> str | None:
        if matrix.kind == "embedding":
            return "bnb holds linear layers, not embeddings"
        if matrix.method != _METHOD or matrix.bits != 4:
            return f"bnb holds 4-bit nf, not {matrix.bits}-bit {matrix.method}"
        if matrix.block_size != 64:
            return f"bnb holds blocks of 64, not {matrix.block_size}"
        if matrix.shape[1] % 64:
            return f"in_features {matrix.shape[1]} is not a multiple of 64"
        return None

    def cannot_describe(self, surroundings: Surroundings) -> str | None:
        return unreplaceable(surroundings.config)

    def specs(self, matrix: Matrix) -> list[TensorSpec]:
        blocks = matrix.elements // 64
        state = len(self._state(matrix))
        return [
            TensorSpec(matrix.name, "U8", (matrix.elements // 2, 1)),
            TensorSpec(f"{matrix.name}.absmax", "F32", (blocks,)),
            TensorSpec(f"{matrix.name}.quant_map", "F32", (16,)),
            TensorSpec(f"{matrix.name}.quant_state.bitsandbytes__nf4", "U8", (state,)),
        ]

    def encode(self, matrix: Matrix, quantized: Quantized) -> dict[str, torch.Tensor]:
        codes = quantized.codes.reshape(-1, 2)
        packed = (codes[:, :1] << 4) | codes[:, 1:]
        state = torch.frombuffer(bytearray(self._state(matrix)), dtype=torch.uint8)
        assert quantized.levels is not None
        return {
            matrix.name: packed,
            f"{matrix.name}.absmax": quantized.scales,
            f"{matrix.name}.quant_map": quantized.levels,
            f"{matrix.name}.quant_state.bitsandbytes__nf4": state,
        }

    def quantized(self, matrix: Matrix, tensors: Mapping[str, torch.Tensor]) -> Quantized:
        packed = tensors[matrix.name].reshape(-1)
        codes = torch.stack([packed >> 4, packed & 15], dim=1).view(matrix.shape)
        return Quantized(
            bits=4,
            block_size=64,
            codes=codes,
            scales=tensors[f"{matrix.name}.absmax"],
            levels=tensors[f"{matrix.name}.quant_map"],
        )

    def decode(self, matrix: Matrix, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.quantized(matrix, tensors).decode()

    def quantization_config(
        self, matrices: Sequence[Matrix], surroundings: Surroundings
    ) -> dict[str, Any]:
        compute = surroundings.config.get("dtype") or surroundings.config.get("torch_dtype")
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": compute if isinstance(compute, str) else "float32",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": skip_list(matrices, surroundings),
        }

    @staticmethod
    def _state(matrix: Matrix) -> bytes:
        state = {
            "quant_type": "nf4",
            "blocksize": 64,
            "dtype": name_of(computed(matrix.dtype)),
            "shape": list(matrix.shape),
        }
        return json.dumps(state).encode()


LAYOUT = BnbLayout
