"""Layout ``gptq``: uniform codes as GPTQ serialises them (``checkpoint_format`` gptq).

``X.qweight`` int32 (in*bits/32, out), packed along in_features; ``X.qzeros`` int32
(groups, out*bits/32) holding zero - 1, packed along out_features; ``X.scales`` float16
(groups, out); ``X.g_idx`` int32 (in,). ``w[o, i] = scales[g, o] * (code - zero)``, g = g_idx[i].
The words hold, at every width, the little-endian bit stream of
:mod:`loftq_cli.checkpoint.packing`. With ``sym: true`` in the config every zero point is
2^(bits - 1), and consumers may leave ``X.qzeros`` unread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.checkpoint.packing import pack, unpack
from loftq_cli.errors import CorruptFileError
from loftq_cli.families.architecture import (
    initialised_through_weights,
    is_decoder_only,
    unreplaceable,
)
from loftq_cli.layouts.base import GROUP_SIZES, Layout, Matrix, Surroundings
from loftq_cli.numerics.quantizers.blocks import Quantized, block_count
from loftq_cli.numerics.quantizers.methods import method

# The stacks that optimum recognises by itself (optimum.gptq.constants.BLOCK_PATTERNS).
_KNOWN_STACKS = (
    "transformer.h",
    "model.decoder.layers",
    "gpt_neox.layers",
    "model.layers",
    "h",
    "decoder.layers",
    "layers",
)


class GptqLayout(Layout):
    """GPTQ at 2, 3, 4 and 8 bits, symmetric or not."""

    name = "gptq"
    imports = ("transformers", "peft", "accelerate", "optimum", "gptqmodel")
    extra = "gptq"
    portable = True
    keeps_decoded = True
    mixes = False  # optimum builds every layer in the config's one width
    auto_rank = 2

    @classmethod
    def method_at(cls, bits: int) -> str | None:
        return "uniform"

    def suits(self, name: str, bits: int, surroundings: Surroundings) -> bool:
        return method(name).decoding == "affine" and is_decoder_only(
            surroundings.config, surroundings.stacks
        )

    def cannot_hold(self, matrix: Matrix) -> str | None:
        if matrix.kind == "embedding":
            return "gptq holds linear layers, not embeddings"
        if matrix.kind == "conv1d":
            return "gptq is not written for Conv1D layers, GPT-2's cannot be loaded"
        out_features, in_features = matrix.shape
        if method(matrix.method).decoding != "affine":
            return f"gptq holds uniform codes, not {matrix.method}"
        if matrix.block_size not in GROUP_SIZES:
            return f"gptq holds groups of 32, 64 or 128, not {matrix.block_size}"
        for side, count in (("in", in_features), ("out", out_features)):
            if count * matrix.bits % 32:
                return f"{side}_features {count} x {matrix.bits} bits is not a multiple of 32"
        return None

    def cannot_describe(self, surroundings: Surroundings) -> str | None:
        if len(surroundings.stacks) != 1:
            stacks = ", ".join(surroundings.stacks) or "none"
            return f"optimum loads gptq layers from one stack of blocks, this model has: {stacks}"
        return initialised_through_weights(surroundings.config) or unreplaceable(
            surroundings.config
        )

    def specs(self, matrix: Matrix) -> list[TensorSpec]:
        out_features, in_features = matrix.shape
        groups = block_count(in_features, matrix.block_size)
        return [
            TensorSpec(
                f"{matrix.module}.qweight", "I32", (in_features * matrix.bits // 32, out_features)
            ),
            TensorSpec(
                f"{matrix.module}.qzeros", "I32", (groups, out_features * matrix.bits // 32)
            ),
            TensorSpec(f"{matrix.module}.scales", "F16", (groups, out_features)),
            TensorSpec(f"{matrix.module}.g_idx", "I32", (in_features,)),
        ]

    def encode(self, matrix: Matrix, quantized: Quantized) -> dict[str, torch.Tensor]:
        out_features = matrix.shape[0]
        assert quantized.zeros is not None
        zeros = quantized.zeros.view(out_features, -1).T - 1
        return {
            f"{matrix.module}.qweight": _words(quantized.codes, matrix.bits).T.contiguous(),
            f"{matrix.module}.qzeros": _words(zeros, matrix.bits),
            f"{matrix.module}.scales": quantized.scales.view(out_features, -1)
            .T.contiguous()
            .half(),
            f"{matrix.module}.g_idx": _group_index(matrix).to(torch.int32),
        }

    def quantized(self, matrix: Matrix, tensors: Mapping[str, torch.Tensor]) -> Quantized:
        if not torch.equal(tensors[f"{matrix.module}.g_idx"].long(), _group_index(matrix)):
            raise CorruptFileError(
                f"tensor '{matrix.module}.g_idx' has the groups in another order"
            )
        zeros = _codes(tensors[f"{matrix.module}.qzeros"], matrix.bits).T + 1
        return Quantized(
            matrix.bits,
            matrix.block_size,
            _codes(tensors[f"{matrix.module}.qweight"].T, matrix.bits),
            tensors[f"{matrix.module}.scales"].float().T.reshape(-1),
            zeros.reshape(-1),
        )

    def decode(self, matrix: Matrix, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        codes = _codes(tensors[f"{matrix.module}.qweight"].T, matrix.bits).float()
        zeros = _codes(tensors[f"{matrix.module}.qzeros"], matrix.bits).float().T + 1
        scales = tensors[f"{matrix.module}.scales"].float().T
        group = tensors[f"{matrix.module}.g_idx"].long()
        if not bool(((group >= 0) & (group < scales.shape[1])).all()):
            raise CorruptFileError(
                f"tensor '{matrix.module}.g_idx' names a group that is not there"
            )
        return (codes - zeros[:, group]) * scales[:, group]

    def quantization_config(
        self, matrices: Sequence[Matrix], surroundings: Surroundings
    ) -> dict[str, Any]:
        stack = surroundings.stacks[0]
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": matrices[0].bits,
            "group_size": matrices[0].block_size,
            "desc_act": False,
            "sym": method(matrices[0].method).symmetric,
            "checkpoint_format": "gptq",
        }
        if stack not in _KNOWN_STACKS:
            config["block_name_to_quantize"] = stack
        if any(name.startswith(f"{stack}.") for name in surroundings.kept_modules):
            config["modules_in_block_to_quantize"] = [[matrix.adapted for matrix in matrices]]
        return config


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 (rows, n) to int32 (rows, n*bits/32); a row fills whole words."""
    packed = pack(codes.contiguous(), bits)
    return packed.view(torch.int32).view(codes.shape[0], -1)


def _codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`_words`."""
    rows, columns = words.shape
    packed = words.contiguous().view(torch.uint8).view(-1)
    return unpack(packed, bits, packed.numel() * 8 // bits).view(rows, columns * 32 // bits)


def _group_index(matrix: Matrix) -> torch.Tensor:
    return torch.arange(matrix.shape[1]) // matrix.block_size


LAYOUT = GptqLayout
