"""Decoders of single matrices, written from the definitions of the formats, one code at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.support import textbook_trellis

Tensors = Mapping[str, torch.Tensor]
Matrix = list[list[float]]


def gptq(tensors: Tensors, module: str, bits: int) -> Matrix:
    """w[o][i] = scales[g][o] * (code - (qzero + 1)), as GPTQ-for-LLaMa's format says."""
    codes = [_fields(column, 32, bits) for column in tensors[f"{module}.qweight"].T.tolist()]
    zeros = [_fields(row, 32, bits) for row in tensors[f"{module}.qzeros"].tolist()]
    scales, groups = tensors[f"{module}.scales"].tolist(), tensors[f"{module}.g_idx"].tolist()
    return [
        [scales[g][o] * (code - zeros[g][o] - 1) for g, code in zip(groups, row, strict=True)]
        for o, row in enumerate(codes)
    ]


def awq(tensors: Tensors, module: str, size: int) -> Matrix:
    """w[o][i] = scales[g][o] * (code - zero), of words that hold outputs 0, 2, 4, 6, 1, 3, 5, 7."""

    def row(words: list[int]) -> list[int]:
        fields = [_fields([word], 32, 4) for word in words]
        return [field[(0, 4, 1, 5, 2, 6, 3, 7)[k]] for field in fields for k in range(8)]

    codes = [row(words) for words in tensors[f"{module}.qweight"].tolist()]
    zeros = [row(words) for words in tensors[f"{module}.qzeros"].tolist()]
    scales = tensors[f"{module}.scales"].tolist()
    columns = [
        [scales[i // size][o] * (code - zeros[i // size][o]) for o, code in enumerate(codes[i])]
        for i in range(len(codes))
    ]
    return [list(values) for values in zip(*columns, strict=True)]


def loftq(tensors: Tensors, name: str, shape: tuple[int, int], entry: Mapping[str, Any]) -> Matrix:
    """docs/output-format.md; ``entry`` is the module's in the quantization_config."""
    rows, columns = shape
    bits, size = entry["bits"], entry["block_size"]
    codes = _fields(tensors[name].tolist(), 8, bits)
    scales = tensors[f"{name}_scales"].tolist()
    if entry.get("scales") == "int8":
        steps = tensors[f"{name}_scale_steps"].tolist()
        scales = [code * steps[k // 64] for k, code in enumerate(scales)]
    if entry["decoding"] == "trellis":
        drawn = torch.tensor(codes[: rows * columns]).view(shape)
        levels = textbook_trellis.values(drawn).view(-1).tolist()
        flat = [scales[k // size] * level for k, level in enumerate(levels)]
        return [flat[row * columns :][:columns] for row in range(rows)]
    if entry["decoding"] == "codebook":
        levels = tensors[f"{name}_levels"].tolist()
        flat = [scales[k // size if size else 0] * levels[codes[k]] for k in range(rows * columns)]
        return [flat[row * columns :][:columns] for row in range(rows)]
    zeros = _fields(tensors[f"{name}_zeros"].tolist(), 8, bits)
    groups = -(-columns // size)
    return [
        [
            scales[row * groups + column // size]
            * (codes[row * columns + column] - zeros[row * groups + column // size])
            for column in range(columns)
        ]
        for row in range(rows)
    ]


def _fields(words: list[int], width: int, bits: int) -> list[int]:
    """The fields of a row of words: the first in the lowest bits, running on across words."""
    stream = sum((word % 2**width) << (width * number) for number, word in enumerate(words))
    return [(stream >> (bits * k)) % 2**bits for k in range(len(words) * width // bits)]
