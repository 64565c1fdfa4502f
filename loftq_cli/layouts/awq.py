"""Layout ``awq``: uniform 4-bit codes as AutoAWQ serialises them (``version`` gemm).

``X.qweight`` int32 (in, out/8) and ``X.qzeros`` int32 (groups, out/8), both packed along
out_features: the lowest four bits hold output 0 of eight, then 2, 4, 6, 1, 3, 5, 7; ``X.scales``
float16 (groups, out). ``w[o, i] = scales[g, o] * (code - zero)``, g = i // group size.
(gptqmodel ``quantization/awq/utils/packing_utils``.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.checkpoint.packing import pack, unpack
from loftq_cli.families.architecture import initialised_through_weights, unreplaceable
from loftq_cli.layouts.base import Layout, Matrix, Surroundings, ungrouped
from loftq_cli.layouts.skipped import skip_list, skips
from loftq_cli.numerics.quantizers.blocks import Quantized
from loftq_cli.numerics.quantizers.methods import method

_BITS = 4
_A_WORD = 8  # codes
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class AwqLayout(Layout):
    """AWQ at 4 bits, symmetric or not."""

    name = "awq"
    imports = ("transformers", "peft", "accelerate", "gptqmodel")
    extra = "gptq"
    portable = True
    keeps_decoded = True
    mixes = False

    @classmethod
    def method_at(cls, bits: int) -> str | None:
        return "uniform"

    def cannot_hold(self, matrix: Matrix) -> str | None:
        if matrix.kind == "embedding":
            return "awq holds linear layers, not embeddings"
        if matrix.kind == "conv1d":
            return "awq is not written for Conv1D layers"
        if method(matrix.method).decoding != "affine" or matrix.bits != _BITS:
            return f"awq holds 4-bit uniform codes, not {matrix.bits}-bit {matrix.method}"
        if (reason := ungrouped(matrix, "awq")) is not None:
            return reason
        if matrix.shape[0] % _A_WORD:
            return f"out_features {matrix.shape[0]} is not a multiple of {_A_WORD}"
        return None

    def cannot_describe(self, surroundings: Surroundings) -> str | None:
        return initialised_through_weights(surroundings.config) or unreplaceable(
            surroundings.config
        )

    def specs(self, matrix: Matrix) -> list[TensorSpec]:
        out_features, in_features = matrix.shape
        groups, words = in_features // matrix.block_size, out_features // _A_WORD
        return [
            TensorSpec(f"{matrix.module}.qweight", "I32", (in_features, words)),
            TensorSpec(f"{matrix.module}.qzeros", "I32", (groups, words)),
            TensorSpec(f"{matrix.module}.scales", "F16", (groups, out_features)),
        ]

    def encode(self, matrix: Matrix, quantized: Quantized) -> dict[str, torch.Tensor]:
        out_features = matrix.shape[0]
        assert quantized.zeros is not None
        scales = quantized.scales.view(out_features, -1).T.contiguous()
        return {
            f"{matrix.module}.qweight": _words(quantized.codes.T),
            f"{matrix.module}.qzeros": _words(quantized.zeros.view(out_features, -1).T),
            f"{matrix.module}.scales": scales.half(),
        }

    def quantized(self, matrix: Matrix, tensors: Mapping[str, torch.Tensor]) -> Quantized:
        return Quantized(
            _BITS,
            matrix.block_size,
            _codes(tensors[f"{matrix.module}.qweight"]).T.contiguous(),
            tensors[f"{matrix.module}.scales"].float().T.reshape(-1),
            _codes(tensors[f"{matrix.module}.qzeros"]).T.reshape(-1),
        )

    def decode(self, matrix: Matrix, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.quantized(matrix, tensors).decode()

    def quantization_config(
        self, matrices: Sequence[Matrix], surroundings: Surroundings
    ) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": _BITS,
            "group_size": matrices[0].block_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": skip_list(matrices, surroundings, _contains),
        }


def _contains(key: str, module: str) -> bool:
    """Whether vLLM, which looks for entries inside names, or transformers skips ``module``."""
    return key in module or skips(key, module)


def _words(codes: torch.Tensor) -> torch.Tensor:
    """uint8 (rows, n) to int32 (rows, n/8)."""
    rows = codes.shape[0]
    ordered = codes.reshape(rows, -1, _A_WORD)[:, :, _ORDER].contiguous()
    return pack(ordered, _BITS).view(torch.int32).view(rows, -1)


def _codes(words: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`_words`."""
    rows, columns = words.shape
    packed = words.contiguous().view(torch.uint8).view(-1)
    ordered = unpack(packed, _BITS, words.numel() * _A_WORD).view(rows, columns, _A_WORD)
    codes = torch.empty_like(ordered)
    codes[:, :, _ORDER] = ordered
    return codes.view(rows, columns * _A_WORD)


LAYOUT = AwqLayout
