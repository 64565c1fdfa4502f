"""GPTQ, AWQ (gemm) and AutoRound's forms of both. W = scale * (code - zero), in float16 as
gptqmodel has it.

GPTQ, 2, 3, 4 or 8 bits: ``X.qweight`` int32 (in*bits/32, out), a bit stream along in; ``X.qzeros``
int32 (groups, out*bits/32), zero - 1 unless ``checkpoint_format`` is gptq_v2; ``X.scales``
(groups, out); ``X.g_idx`` int32 (in,), any order, without it as they come. AWQ, 4 bits:
``X.qweight`` int32 (in, out/8), outputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on; zeros
alike, as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from loftq_cli.checkpoint.decoding.parts import (
    Model,
    broken,
    check_shape,
    checked_scales,
    grouped,
)
from loftq_cli.checkpoint.dtypes import torch_dtype
from loftq_cli.checkpoint.encoded import EncodedTensor
from loftq_cli.checkpoint.packing import unpack
from loftq_cli.errors import UnsupportedInputError

NAME = "GPTQ or AWQ"
_CODES = ".qweight"
_WIDTHS = (2, 3, 4, 8)
_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
# What AutoRound calls them (auto_round/inference/backend.py): zero points less one, or as they are.
_OF_AUTO_ROUND = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
}


def find(model: Model) -> Iterator[tuple[EncodedTensor, set[str]]]:
    """Every quantized weight, and the names of the stored tensors that it takes up. Raises
    UnsupportedInputError for other kinds, CorruptFileError for parts that do not fit."""
    if not model.stated:
        return  # kinds are not told by shapes
    for stored, part in model.parts.items():
        module = stored.removesuffix(_CODES)
        if module == stored or part.tensor.dtype != "I32" or len(part.tensor.shape) != 2:
            continue
        kind, stated = _kind(model, stored)
        name = f"{module}.weight"
        others = {}
        for key in ("qzeros", "scales", "g_idx"):
            if f"{module}.{key}" in model.parts:
                others[key] = model.parts[f"{module}.{key}"]
            elif key != "g_idx":
                raise broken(name, f"{module}.{key} is missing")
        if kind == "awq":
            others.pop("g_idx", None)
        scales, zeros = others["scales"].tensor, others["qzeros"].tensor
        groups, outputs = scales.shape if len(scales.shape) == 2 else (0, 0)
        if not groups or not outputs or len(zeros.shape) != 2:
            raise broken(name, f"{scales.name} is {list(scales.shape)}, not (groups, out)")
        bits = 4 if kind == "awq" else zeros.shape[1] * 32 // outputs
        if bits not in _WIDTHS:
            raise _unread(model, stored, f"{bits} bits")
        check_shape(name, others["qzeros"], (groups, outputs * bits // 32))
        first, second = part.tensor.shape
        inputs = first if kind == "awq" else first * 32 // bits
        check_shape(name, part, (inputs, outputs // 8) if kind == "awq" else (first, outputs))
        if second != part.tensor.shape[1] or ("g_idx" not in others and inputs % groups):
            raise broken(name, f"{inputs} inputs in {groups} groups")
        decode = partial(_decoded, name=name, kind=kind, bits=bits, dtype=torch_dtype(model.dtype))
        shape = outputs, inputs
        encoded = EncodedTensor.of(name, model.dtype, shape, part, others, decode, stated)
        yield encoded, {*encoded.names, f"{module}.g_idx"} & model.parts.keys()


def _kind(model: Model, stored: str) -> tuple[str, dict[str, Any]]:
    """gptq, gptq_v2 or awq, and what says so. Raises UnsupportedInputError."""
    stated = model.stated
    method, packing = stated.get("quant_method"), stated.get("packing_format")
    form = stated.get("checkpoint_format", stated.get("version", stated.get("format", "gptq")))
    if method in ("auto-round", "intel/auto-round") and packing in _OF_AUTO_ROUND:
        return _OF_AUTO_ROUND[packing], {"quant_method": method, "packing_format": packing}
    if method == "gptq" and form in ("gptq", "gptq_v2"):
        return form, {"quant_method": method, "checkpoint_format": form}
    if method == "awq" and str(form).lower() in ("gemm", "gptq"):
        return "awq", {"quant_method": method, "version": "gemm"}
    raise _unread(model, stored, packing or form)


def _unread(model: Model, stored: str, what: object) -> UnsupportedInputError:
    method, bits = model.stated.get("quant_method"), model.stated.get("bits")
    return UnsupportedInputError(
        f"tensor {stored!r}: the checkpoint is quantized already ({method}, {bits} bits, {what}), "
        "and only GPTQ with 2, 3, 4 or 8 bits and AWQ (gemm) with 4 are read",
        hint="convert the full-precision checkpoint it was made from",
    )


def _decoded(
    codes: torch.Tensor,
    others: Mapping[str, torch.Tensor],
    *,
    name: str,
    kind: str,
    bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    checked_scales(name, others["scales"])
    scales = others["scales"].half()
    groups = len(scales)
    if kind == "awq":
        rows, zeros = _in_order(codes), _in_order(others["qzeros"])
    else:
        rows = _unpacked(codes.T.contiguous(), bits).T
        zeros = _unpacked(others["qzeros"], bits)
        zeros = zeros + (0 if kind == "gptq_v2" else 1)
    group = grouped(name, others.get("g_idx"), len(rows), groups)
    values = rows.half() - zeros.half()[group]
    return values.mul_(scales[group]).T.to(dtype).contiguous()


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int16 (n, codes) of int32 (n, words)."""
    raw = words.contiguous().view(torch.uint8).view(-1)
    return unpack(raw, bits, raw.numel() * 8 // bits).view(len(words), -1).short()


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """int16 (n, outputs) of AWQ's words."""
    fields = _unpacked(words, 4).view(len(words), -1, 8)
    ordered = torch.empty_like(fields)
    ordered[:, :, _ORDER] = fields
    return ordered.view(len(words), -1)
