"""compressed-tensors pack-quantized with 2 to 8 bits: ``X.weight_packed`` int32 (out,
in*bits/32), each row a bit stream; ``X.weight_scale`` (out, groups); ``X.weight_zero_point`` int32,
packed along out, if the codes are asymmetric; ``X.weight_g_idx`` int32 (in,), if columns were
quantized in another order; ``X.weight_shape``. W = scale * (code - zero), multiplied in the dtype
of the scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch

from loftq_cli.checkpoint.decoding.parts import (
    Model,
    broken,
    check_shape,
    checked_scales,
    grouped,
    schemes,
)
from loftq_cli.checkpoint.dtypes import torch_dtype
from loftq_cli.checkpoint.encoded import EncodedTensor
from loftq_cli.checkpoint.packing import unpack
from loftq_cli.errors import UnsupportedInputError

NAME = "compressed-tensors pack-quantized"
_CODES = "_packed"
_BITS = range(2, 9)


def find(model: Model) -> Iterator[tuple[EncodedTensor, set[str]]]:
    """Every packed weight, and the names of the stored tensors that it takes up. Raises
    UnsupportedInputError for other widths, CorruptFileError for parts that do not fit."""
    if not model.stated:
        return  # widths are not told by shapes
    for stored, part in model.parts.items():
        name = stored.removesuffix(_CODES)
        if name == stored or not name.endswith(".weight") or part.tensor.dtype != "I32":
            continue
        others = {
            key: model.parts[f"{name}_{key}"]
            for key in ("shape", "zero_point", "g_idx")
            if f"{name}_{key}" in model.parts
        }
        rows, words = part.tensor.shape
        bits, columns = _width(model, name, stored, words)
        scale = model.parts.get(f"{name}_scale")
        if scale is None or scale.tensor.dtype not in ("F32", "BF16", "F16"):
            raise broken(name, f"{name}_scale is missing, or no float")
        groups = scale.tensor.shape[-1] if len(scale.tensor.shape) == 2 else 1
        check_shape(name, scale, (rows, groups), (1,) if groups == 1 else (rows, groups))
        if columns % groups:
            raise broken(name, f"{columns} columns with {groups} scales a row")
        others["s"] = scale
        if "zero_point" in others:
            check_shape(name, others["zero_point"], (-(-rows * bits // 32), groups))
        decode = partial(
            _decoded, name=name, bits=bits, columns=columns, dtype=torch_dtype(model.dtype)
        )
        shape, stated = (rows, columns), {"num_bits": bits}
        encoded = EncodedTensor.of(name, model.dtype, shape, part, others, decode, stated)
        yield encoded, set(encoded.names)


def _width(model: Model, name: str, stored: str, words: int) -> tuple[int, int]:
    """The bits of a code, and how many there are in a row of ``words``: as config.json says, if it
    has one width for all, or else by the number of columns that the file states."""
    widths = {each.get("num_bits") for each in schemes(model.stated)}
    stated = [bits for bits in _BITS if bits in widths]
    if len(widths) == len(stated) == 1 and words * 32 % stated[0] == 0:
        return stated[0], words * 32 // stated[0]
    shape = model.parts.get(f"{name}_shape")
    if shape is not None and shape.tensor.elements == 2:
        columns = int(model.read(shape)[1])
        fit = [bits for bits in _BITS if -(-columns * bits // 32) == words]
        fit = [bits for bits in fit if bits in stated] or fit
        if len(fit) == 1:
            return fit[0], columns
        raise broken(name, f"{words} words a row for {columns} columns")
    raise UnsupportedInputError(
        f"tensor {stored!r}: the checkpoint is quantized already ({NAME}), and neither config.json "
        "nor the file itself gives it one width of 2 to 8 bits",
        hint="convert the full-precision checkpoint it was made from",
    )


def _decoded(
    codes: torch.Tensor,
    others: Mapping[str, torch.Tensor],
    *,
    name: str,
    bits: int,
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    rows = codes.shape[0]
    if "shape" in others and others["shape"].tolist() != [rows, columns]:
        raise broken(name, f"weight_shape is {others['shape'].tolist()}, not {[rows, columns]}")
    checked_scales(name, others["s"])
    scales = others["s"].reshape(-1, others["s"].shape[-1] if others["s"].dim() == 2 else 1)
    values = _unpacked(codes, bits)[:, :columns].to(scales.dtype)
    group = grouped(name, others.get("g_idx"), columns, scales.shape[1])
    if "zero_point" in others:
        zeros = _unpacked(others["zero_point"].T.contiguous(), bits)[:, :rows].T
        values -= zeros.to(scales.dtype)[:, group]
    else:
        values -= 2 ** (bits - 1)
    scaled: torch.Tensor = values.mul_(scales[:, group])
    return scaled.to(dtype)


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 (n, codes) of int32 (n, words), each row a stream of its own; bits left over at the
    end of a row are no codes."""
    held = words.shape[1] * 32 // bits
    raw = words.contiguous().view(torch.uint8).view(len(words), -1)
    if words.shape[1] * 32 % bits == 0:
        return unpack(raw.view(-1), bits, len(words) * held).view(len(words), held)
    return torch.stack([unpack(row, bits, held) for row in raw])
