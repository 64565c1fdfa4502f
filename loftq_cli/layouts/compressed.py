"""Layout ``compressed``: compressed-tensors' pack-quantized, which vLLM and SGLang serve.

``X.weight_packed`` int32 (out, in*bits/32), the codes of each row as a bit stream, the lowest bit
first, in which a code may straddle two words; ``X.weight_scale`` (out, groups) in the matrix's
dtype; ``X.weight_zero_point`` int32 (ceil(out*bits/32), groups), packed along out_features, absent
if the method is symmetric; ``X.weight_shape`` int64 (2,).
``w[o, i] = scale[o, g] * (code - zero)``. (compressed_tensors ``compressors/pack_quantized``, which
stores code + 2^(bits - 1) of signed codes: our codes as they are.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loftq_cli.checkpoint.dtypes import computed, torch_dtype
from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.checkpoint.packing import pack, packed_length, unpack
from loftq_cli.errors import CorruptFileError
from loftq_cli.families.architecture import ADDED_HEADS, unreplaceable
from loftq_cli.families.experts import is_expert
from loftq_cli.families.fused import fused_parts
from loftq_cli.layouts.base import Layout, Matrix, Surroundings, ungrouped
from loftq_cli.numerics.quantizers.blocks import Quantized
from loftq_cli.numerics.quantizers.decoding import decode
from loftq_cli.numerics.quantizers.methods import method
from loftq_cli.numerics.quantizers.packed import Packed

_WORD = 32  # bits; also the codes that fill whole words at every width


class CompressedLayout(Layout):
    """compressed-tensors, pack-quantized, at 2, 3, 4 and 8 bits, symmetric or not."""

    name = "compressed"
    imports = ("transformers", "peft", "loftq_cli")
    portable = True
    packs = True
    holds_fused_alike = True
    holds_experts = True

    @classmethod
    def method_at(cls, bits: int) -> str | None:
        return "uniform"

    def cannot_hold(self, matrix: Matrix) -> str | None:
        if matrix.kind == "embedding":
            return "compressed holds linear layers, not embeddings"
        if matrix.kind == "conv1d":
            return "compressed is not written for Conv1D layers"
        if method(matrix.method).decoding != "affine":
            return f"compressed holds uniform codes, not {matrix.method}"
        if (reason := ungrouped(matrix, "compressed")) is not None:
            return reason
        fits_a_word = matrix.bits == 4 and matrix.shape[0] * 4 <= _WORD
        if fits_a_word and not method(matrix.method).symmetric:
            # Its unpacking takes one word a group for contiguous, and raises.
            return f"compressed-tensors 0.20 cannot read the zero points of {matrix.shape[0]} rows"
        return None

    def cannot_describe(self, surroundings: Surroundings) -> str | None:
        return unreplaceable(surroundings.config)

    def cannot_combine(self, matrices: Sequence[Matrix]) -> str | None:
        forms = {matrix.name: _form(matrix) for matrix in matrices}
        for names in fused_parts(forms):
            if len({forms[name] for name in names}) > 1:
                listed = ", ".join(f"{name} {forms[name][0]} bits" for name in names)
                return f"parts that servers fuse in several widths: {listed}"
        return None

    def remark(self, matrices: Sequence[Matrix]) -> str | None:
        if any(is_expert(each.name) and not method(each.method).symmetric for each in matrices):
            return (
                "layout compressed with zero points of experts: transformers alone cannot decode "
                "them; loftq_cli.load does (--method uniform-symmetric has none)"
            )
        if len({_form(matrix) for matrix in matrices}) == 1:
            return None
        return (
            "layout compressed with several widths: transformers alone would decode all of them as "
            "the first; loftq_cli.load and vLLM take each as it is"
        )

    def specs(self, matrix: Matrix) -> list[TensorSpec]:
        out_features, in_features = matrix.shape
        name, groups = matrix.name, in_features // matrix.block_size
        packed = TensorSpec(
            f"{name}_packed", "I32", (out_features, in_features * matrix.bits // 32)
        )
        specs = [packed, TensorSpec(f"{name}_scale", _scale_tag(matrix), (out_features, groups))]
        if not method(matrix.method).symmetric:
            words = -(-out_features * matrix.bits // _WORD)
            specs.append(TensorSpec(f"{name}_zero_point", "I32", (words, groups)))
        return [*specs, TensorSpec(f"{name}_shape", "I64", (2,))]

    def loaded_bytes(self, matrix: Matrix, bits: int) -> int:
        out_features, in_features = matrix.shape
        scales = out_features * (in_features // matrix.block_size)
        codes = packed_length(matrix.elements, matrix.bits)
        return codes + 4 * scales + packed_length(scales, matrix.bits)

    def encode(self, matrix: Matrix, quantized: Quantized) -> dict[str, torch.Tensor]:
        out_features, in_features = matrix.shape
        name, bits = matrix.name, matrix.bits
        groups = in_features // matrix.block_size
        scales = quantized.scales.view(out_features, groups).to(torch_dtype(_scale_tag(matrix)))
        codes = pack(quantized.codes, bits).view(torch.int32).view(out_features, -1)
        tensors = {f"{name}_packed": codes, f"{name}_scale": scales}
        if not method(matrix.method).symmetric:
            assert quantized.zeros is not None
            zeros = quantized.zeros.view(out_features, groups).T
            words = -(-out_features * bits // _WORD)
            filled = torch.nn.functional.pad(zeros, (0, -out_features % _WORD)).contiguous()
            packed = pack(filled, bits).view(torch.int32).view(groups, -1)
            tensors[f"{name}_zero_point"] = packed[:, :words].T.contiguous()
        return {**tensors, f"{name}_shape": torch.tensor(matrix.shape)}

    def packed(self, matrix: Matrix, tensors: Mapping[str, torch.Tensor]) -> Packed:
        name, bits = matrix.name, matrix.bits
        if tensors[f"{name}_shape"].tolist() != list(matrix.shape):
            raise CorruptFileError(
                f"tensor '{name}_shape' is {tensors[f'{name}_shape'].tolist()}, the matrix "
                f"{list(matrix.shape)}"
            )
        scales = tensors[f"{name}_scale"].float()
        if method(matrix.method).symmetric:
            zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8)
        else:
            zeros = _along_rows(tensors[f"{name}_zero_point"], bits, matrix.shape[0])
        codes = tensors[f"{name}_packed"].contiguous().view(torch.uint8).view(-1)
        packed_zeros = pack(zeros.contiguous(), bits)
        return Packed(
            matrix.shape, bits, matrix.block_size, codes, scales.reshape(-1), packed_zeros
        )

    def quantized(self, matrix: Matrix, tensors: Mapping[str, torch.Tensor]) -> Quantized:
        return self.packed(matrix, tensors).unpacked()

    def decode(self, matrix: Matrix, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return decode(self.packed(matrix, tensors))

    def quantization_config(
        self, matrices: Sequence[Matrix], surroundings: Surroundings
    ) -> dict[str, Any]:
        by_form: dict[tuple[int, int, bool], list[str]] = {}
        for matrix in matrices:
            by_form.setdefault(_form(matrix), []).append(matrix.adapted)
        alone = len(by_form) == 1
        groups = {
            f"group_{number}": {
                "targets": ["Linear"] if alone else names,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": symmetric,
                    "strategy": "group",
                    "group_size": size,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for number, ((bits, size, symmetric), names) in enumerate(sorted(by_form.items()))
        }
        quantized = {matrix.adapted for matrix in matrices}
        added = [head for head in ADDED_HEADS if not _ends_one(head, quantized)]
        heads = [f"re:(.*\\.)?({'|'.join(added)})$"] if added else []
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [*sorted(set(surroundings.kept_modules) - quantized), *heads],
        }


def _form(matrix: Matrix) -> tuple[int, int, bool]:
    """What makes a scheme of its own: width, group size, and whether it is symmetric."""
    return matrix.bits, matrix.block_size, method(matrix.method).symmetric


def _scale_tag(matrix: Matrix) -> str:
    return computed(matrix.dtype)


def _ends_one(head: str, names: set[str]) -> bool:
    return any(name.rpartition(".")[2] == head for name in names)


def _along_rows(words: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """Zero points uint8 (rows, groups), of words that are packed along the rows."""
    groups = words.shape[1]
    missing = -(-rows // _WORD) * bits - words.shape[0]
    filled = torch.nn.functional.pad(words.T, (0, missing)).contiguous()
    codes = unpack(filled.view(torch.uint8).view(-1), bits, filled.numel() * _WORD // bits)
    return codes.view(groups, -1)[:, :rows].T


LAYOUT = CompressedLayout
