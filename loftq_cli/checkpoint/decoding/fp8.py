"""FP8 weights: one scale a block (``weight_scale_inv``: DeepSeek-V3, Qwen3), a row or a tensor
(``weight_scale``: compressed-tensors float-quantized). W = code * scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from loftq_cli.checkpoint.decoding.parts import Model, broken, checked_scales, schemes
from loftq_cli.checkpoint.dtypes import torch_dtype
from loftq_cli.checkpoint.encoded import EncodedTensor, Part
from loftq_cli.checkpoint.header import shown
from loftq_cli.errors import UnsupportedInputError

NAME = "FP8"
_CODES = ("F8_E4M3", "F8_E5M2")
_SCALES = ("_scale_inv", "_scale")
_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_LEFT = ("input_scale", "activation_scale", "k_scale", "v_scale", "q_scale")
"""Scales of activations, beside a weight's module; they have no part in it."""


def find(model: Model) -> Iterator[tuple[EncodedTensor, set[str]]]:
    """Every FP8 tensor, and the names of the stored tensors that it takes up. Raises
    UnsupportedInputError or CorruptFileError for one that cannot be read."""
    for name, part in model.parts.items():
        if part.tensor.dtype not in _CODES:
            continue
        if not name.endswith(".weight") or len(part.tensor.shape) != 2:
            raise UnsupportedInputError(
                f"{part.path}: tensor {shown(name)} is {part.tensor.dtype} "
                f"{list(part.tensor.shape)}: the checkpoint is quantized already, and only "
                "two-dimensional FP8 weights are read",
                hint="convert the full-precision checkpoint it was made from",
            )
        scale = next((model.parts[name + s] for s in _SCALES if name + s in model.parts), None)
        if scale is None and not model.stated:
            continue  # a cast to FP8 and nothing else, perhaps: refused as such
        if scale is None or scale.tensor.dtype not in _DTYPES:
            raise broken(name, "is FP8, and there is no scale for it (weight_scale)")
        rows, columns = _block(name, part.tensor.shape, scale, model.stated)
        rounds = scale.tensor.dtype in ("BF16", "F16") and scale.tensor.name.endswith("_scale")
        decode = partial(
            _decoded,
            name=name,
            block=(rows, columns),
            through=torch_dtype(scale.tensor.dtype if rounds else "F32"),
            dtype=torch_dtype(model.dtype),
        )
        module = name.removesuffix("weight")
        left = {module + key for key in _LEFT} & model.parts.keys()
        shape, stated = part.tensor.shape, {"weight_block_size": [rows, columns]}
        encoded = EncodedTensor.of(name, model.dtype, shape, part, {"s": scale}, decode, stated)
        yield encoded, {*encoded.names, *left}


def _block(
    name: str, shape: tuple[int, ...], scale: Part, stated: Mapping[str, Any]
) -> tuple[int, int]:
    """The rows and columns that have a scale together. Raises CorruptFileError."""
    rows, columns = shape
    grid = scale.tensor.shape
    if grid in ((), (1,), (1, 1)):
        return rows, columns
    if grid in ((rows,), (rows, 1)):
        return 1, columns
    if len(grid) == 2:
        for block in (*_stated_blocks(stated), (128, 128)):
            if grid == (-(-rows // block[0]), -(-columns // block[1])):
                return block
        if grid[0] and grid[1] and rows % grid[0] == columns % grid[1] == 0:
            return rows // grid[0], columns // grid[1]
    raise broken(name, f"{list(shape)} with scales {list(grid)}, which are no blocks of it")


def _stated_blocks(stated: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    found = [stated.get("weight_block_size")]
    found += [each.get("block_structure") for each in schemes(stated)]
    for block in found:
        sizes = block if isinstance(block, list) and len(block) == 2 else []
        if sizes and all(type(size) is int and size > 0 for size in sizes):
            yield sizes[0], sizes[1]


def _decoded(
    codes: torch.Tensor,
    others: Mapping[str, torch.Tensor],
    *,
    name: str,
    block: tuple[int, int],
    through: torch.dtype,
    dtype: torch.dtype,
) -> torch.Tensor:
    """In float32, rounded to ``through``, in which compressed-tensors multiplies, and to
    ``dtype``."""
    scales = others["s"]
    if scales.dtype == torch.uint8:
        scales = (scales.float() - 127).exp2()
    grid = checked_scales(name, scales)
    rows, columns = codes.shape
    counts = -(-rows // block[0]), -(-columns // block[1])
    grid = grid.reshape(counts if grid.numel() == counts[0] * counts[1] else (1, 1))
    result = torch.empty(codes.shape, dtype=dtype)
    for first in range(counts[0]):  # a row of blocks at a time: little memory beside the result
        band = slice(first * block[0], min((first + 1) * block[0], rows))
        scale = grid[min(first, len(grid) - 1)].repeat_interleave(block[1])[:columns]
        result[band] = (codes[band].float() * scale).to(through)
    return result
