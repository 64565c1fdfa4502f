"""compressed-tensors pack-quantized with 4 or 8 bits (Kimi-K2): ``X.weight_packed`` int32
(out, in*bits/32), the lowest bits first; ``X.weight_scale`` (out, groups);
``X.weight_zero_point`` int32, packed along out, if the codes are asymmetric; ``X.weight_g_idx``
int32 (in,), if columns were quantized in another order; ``X.weight_shape``.
W = scale * (code - zero), multiplied in the dtype of the scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from loftq_cli.checkpoint.decoding.parts import Model, broken, check_shape, checked_scales, nibbles
from loftq_cli.checkpoint.dtypes import torch_dtype
from loftq_cli.checkpoint.encoded import EncodedTensor
from loftq_cli.errors import UnsupportedInputError

NAME = "compressed-tensors pack-quantized"
_CODES = "_packed"
_BITS = (4, 8)


def find(model: Model) -> Iterator[tuple[EncodedTensor, set[str]]]:
    """Every packed weight, and the names of the stored tensors that it takes up. Raises
    UnsupportedInputError for other widths, CorruptFileError for parts that do not fit."""
    if not model.stated:
        return  # widths are not told by shapes
    for stored, part in model.parts.items():
        name = stored.removesuffix(_CODES)
        if name == stored or not name.endswith(".weight") or part.tensor.dtype != "I32":
            continue
        bits = _width(model.stated, stored)
        rows, words = part.tensor.shape
        columns = words * 32 // bits
        scale = model.parts.get(f"{name}_scale")
        if scale is None or scale.tensor.dtype not in ("F32", "BF16", "F16"):
            raise broken(name, f"{name}_scale is missing, or no float")
        groups = scale.tensor.shape[-1] if len(scale.tensor.shape) == 2 else 1
        check_shape(name, scale, (rows, groups), (1,) if groups == 1 else (rows, groups))
        if columns % groups:
            raise broken(name, f"{columns} columns with {groups} scales a row")
        others = {"s": scale}
        for key in ("shape", "zero_point", "g_idx"):
            if f"{name}_{key}" in model.parts:
                others[key] = model.parts[f"{name}_{key}"]
        if "zero_point" in others:
            check_shape(name, others["zero_point"], (-(-rows * bits // 32), groups))
        decode = partial(_decoded, name=name, bits=bits, dtype=torch_dtype(model.dtype))
        encoded = EncodedTensor(
            name, model.dtype, (rows, columns), part.tensor.start, part, others, decode
        )
        yield encoded, {stored, *(other.tensor.name for other in others.values())}


def _width(stated: Mapping[str, Any], stored: str) -> int:
    groups = stated.get("config_groups")
    schemes = groups.values() if isinstance(groups, Mapping) else ()
    weights = [each.get("weights") for each in schemes if isinstance(each, Mapping)]
    found = {each.get("num_bits") for each in weights if isinstance(each, Mapping)}
    if len(found) == 1 and (bits := found.pop()) in _BITS:
        return int(bits)
    raise UnsupportedInputError(
        f"tensor {stored!r}: the checkpoint is quantized already ({NAME}), and config.json does "
        "not give it one width of 4 or 8 bits",
        hint="convert the full-precision checkpoint it was made from",
    )


def _decoded(
    codes: torch.Tensor,
    others: Mapping[str, torch.Tensor],
    *,
    name: str,
    bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    rows, columns = codes.shape[0], codes.shape[1] * 32 // bits
    if "shape" in others and others["shape"].tolist() != [rows, columns]:
        raise broken(name, f"weight_shape is {others['shape'].tolist()}, not {[rows, columns]}")
    checked_scales(name, others["s"])
    scales = others["s"].reshape(-1, others["s"].shape[-1] if others["s"].dim() == 2 else 1)
    values = _unpacked(codes, bits).to(scales.dtype)
    groups = scales.shape[1]
    group = torch.arange(columns) // (columns // groups)
    if "g_idx" in others:
        group = others["g_idx"].long()
        if group.shape != (columns,) or not bool(((group >= 0) & (group < groups)).all()):
            raise broken(name, "weight_g_idx names a group that is not there")
    if "zero_point" in others:
        zeros = _unpacked(others["zero_point"].T.contiguous(), bits)[:, :rows].T
        values -= zeros.to(scales.dtype)[:, group]
    else:
        values -= 2 ** (bits - 1)
    scaled: torch.Tensor = values.mul_(scales[:, group])
    return scaled.to(dtype)


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 (n, codes) of int32 (n, words)."""
    raw = words.contiguous().view(torch.uint8)
    return nibbles(raw) if bits == 4 else raw
