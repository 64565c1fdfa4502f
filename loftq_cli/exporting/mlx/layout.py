"""How MLX stores a quantized matrix (``mlx.core.quantize``, mode affine).

``X.weight`` uint32 (out, in*bits/32), the codes of each row as a bit stream, the lowest bit first;
``X.scales`` and ``X.biases`` (out, in/group), in the matrix's dtype.
``w[o, i] = scales[o, g] * code + biases[o, g]``, so a zero point becomes ``-scale * zero``, for
which the dtype may have too few bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loftq_cli.checkpoint.dtypes import computed, torch_dtype
from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.checkpoint.packing import pack, unpack
from loftq_cli.layouts.base import Layout, Matrix, Surroundings, ungrouped
from loftq_cli.numerics.quantizers.blocks import Quantized
from loftq_cli.numerics.quantizers.methods import method

_WORD = 32  # bits


class MlxLayout(Layout):
    """Uniform codes at 2, 3, 4 and 8 bits. It is no layout of a conversion: mlx-lm alone reads
    it."""

    name = "mlx"
    imports = ("mlx_lm",)

    def cannot_hold(self, matrix: Matrix) -> str | None:
        if matrix.kind == "conv1d":
            return "mlx-lm transposes Conv1D layers as it loads them"
        if method(matrix.method).decoding != "affine":
            return f"MLX holds uniform codes, not {matrix.method}"
        return ungrouped(matrix, "MLX")

    def specs(self, matrix: Matrix) -> list[TensorSpec]:
        rows, columns = matrix.shape
        tag, groups = computed(matrix.dtype), columns // matrix.block_size
        return [
            TensorSpec(f"{matrix.module}.weight", "U32", (rows, columns * matrix.bits // _WORD)),
            TensorSpec(f"{matrix.module}.scales", tag, (rows, groups)),
            TensorSpec(f"{matrix.module}.biases", tag, (rows, groups)),
        ]

    def encode(self, matrix: Matrix, quantized: Quantized) -> dict[str, torch.Tensor]:
        """Scales and biases are rounded to the matrix's dtype: :meth:`decode` says whether the
        values are the same."""
        rows, dtype = matrix.shape[0], torch_dtype(computed(matrix.dtype))
        assert quantized.zeros is not None
        scales, zeros = (part.view(rows, -1) for part in (quantized.scales, quantized.zeros))
        packed = pack(quantized.codes, matrix.bits).view(torch.uint32)
        return {
            f"{matrix.module}.weight": packed.view(rows, -1),
            f"{matrix.module}.scales": scales.to(dtype),
            f"{matrix.module}.biases": (-scales * zeros).to(dtype),
        }

    def decode(self, matrix: Matrix, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        packed = tensors[f"{matrix.module}.weight"].contiguous().view(torch.uint8).view(-1)
        codes = unpack(packed, matrix.bits, matrix.elements).float()
        scales, biases = (
            tensors[f"{matrix.module}.{part}"].float()[..., None] for part in ("scales", "biases")
        )
        blocks = codes.view(*scales.shape[:2], matrix.block_size)
        return (scales * blocks + biases).view(matrix.shape)

    def quantization_config(
        self, matrices: Sequence[Matrix], surroundings: Surroundings
    ) -> dict[str, Any]:
        """The entry ``quantization``: what most have, and by name what others have."""
        forms = {matrix.module: _form(matrix) for matrix in matrices}
        (most, _), *_ = Counter(forms.values()).most_common(1)
        others = {name: _described(form) for name, form in forms.items() if form != most}
        return {**_described(most), "mode": "affine", **others}


def _form(matrix: Matrix) -> tuple[int, int]:
    return matrix.block_size, matrix.bits


def _described(form: tuple[int, int]) -> dict[str, int]:
    return {"group_size": form[0], "bits": form[1]}
