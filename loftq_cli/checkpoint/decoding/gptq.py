"""GPTQ and AWQ (gemm) with 4 or 8 bits. W = scale * (code - zero), in float16 as gptqmodel has it.

GPTQ: ``X.qweight`` int32 (in*bits/32, out), packed along in; ``X.qzeros`` int32
(groups, out*bits/32), zero - 1 unless ``checkpoint_format`` is gptq_v2; ``X.scales``
(groups, out); ``X.g_idx`` int32 (in,), any order. AWQ, 4 bits: ``X.qweight`` int32 (in, out/8),
outputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on; zeros alike, as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch

from loftq_cli.checkpoint.decoding.parts import Model, broken, check_shape, checked_scales, nibbles
from loftq_cli.checkpoint.dtypes import torch_dtype
from loftq_cli.checkpoint.encoded import EncodedTensor
from loftq_cli.errors import UnsupportedInputError

NAME = "GPTQ or AWQ"
_CODES = ".qweight"
_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def find(model: Model) -> Iterator[tuple[EncodedTensor, set[str]]]:
    """Every quantized weight, and the names of the stored tensors that it takes up. Raises
    UnsupportedInputError for other kinds, CorruptFileError for parts that do not fit."""
    if not model.stated:
        return  # kinds and widths are not told by shapes
    for stored, part in model.parts.items():
        module = stored.removesuffix(_CODES)
        if module == stored or part.tensor.dtype != "I32":
            continue
        kind, bits = _kind(model, stored)
        name = f"{module}.weight"
        others = {}
        for key in ("qzeros", "scales", *(["g_idx"] if kind != "awq" else [])):
            if f"{module}.{key}" not in model.parts:
                raise broken(name, f"{module}.{key} is missing")
            others[key] = model.parts[f"{module}.{key}"]
        first, second = part.tensor.shape
        inputs, outputs = (first, second * 8) if kind == "awq" else (first * 32 // bits, second)
        groups = others["scales"].tensor.shape[0]
        check_shape(name, others["scales"], (groups, outputs))
        check_shape(name, others["qzeros"], (groups, outputs * bits // 32))
        if not groups or (kind == "awq" and inputs % groups):
            raise broken(name, f"{inputs} inputs in {groups} groups")
        decode = partial(_decoded, name=name, kind=kind, bits=bits, dtype=torch_dtype(model.dtype))
        encoded = EncodedTensor(
            name, model.dtype, (outputs, inputs), part.tensor.start, part, others, decode
        )
        yield encoded, {stored, *(other.tensor.name for other in others.values())}


def _kind(model: Model, stored: str) -> tuple[str, int]:
    stated = model.stated
    method, bits = stated.get("quant_method"), stated.get("bits")
    form = stated.get("checkpoint_format", stated.get("version", stated.get("format", "gptq")))
    if method == "gptq" and bits in (4, 8) and form in ("gptq", "gptq_v2"):
        return form, int(bits)
    if method == "awq" and bits == 4 and str(form).lower() in ("gemm", "gptq"):
        return "awq", 4
    raise UnsupportedInputError(
        f"tensor {stored!r}: the checkpoint is quantized already ({method}, {bits} bits, {form}), "
        "and only GPTQ with 4 or 8 bits and AWQ (gemm) with 4 are read",
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
        group = torch.arange(len(rows)) // (len(rows) // groups)
    else:
        rows = _unpacked(codes.T.contiguous(), bits).T
        zeros = _unpacked(others["qzeros"], bits)
        zeros = zeros + (0 if kind == "gptq_v2" else 1)
        group = others["g_idx"].long()
        if group.shape != (len(rows),) or not bool(((group >= 0) & (group < groups)).all()):
            raise broken(name, "g_idx names a group that is not there")
    values = rows.half() - zeros.half()[group]
    return values.mul_(scales[group]).T.to(dtype).contiguous()


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int16 (n, codes) of int32 (n, words)."""
    raw = words.contiguous().view(torch.uint8)
    return (nibbles(raw) if bits == 4 else raw).short()


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """int16 (n, outputs) of AWQ's words."""
    fields = _unpacked(words, 4).view(len(words), -1, 8)
    ordered = torch.empty_like(fields)
    ordered[:, :, _ORDER] = fields
    return ordered.view(len(words), -1)
