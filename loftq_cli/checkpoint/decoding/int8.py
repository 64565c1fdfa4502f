"""Weights of 8-bit integers. bitsandbytes: ``X.weight`` int8 (out, in) and ``X.SCB`` float32
(out,), the largest magnitude of each row; W = code * SCB / 127 (LLM.int8()). compressed-tensors
int-quantized: ``X.weight_scale`` (out, groups), (out, 1) or (1,), ``X.weight_zero_point`` int8
likewise; W = scale * (code - zero), multiplied in the dtype of the scales."""

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
)
from loftq_cli.checkpoint.dtypes import torch_dtype
from loftq_cli.checkpoint.encoded import EncodedTensor, Part

NAME = "8-bit integers"
_STEP = 7.874015718698502e-3  # 1 / 127, as bitsandbytes has it


def find(model: Model) -> Iterator[tuple[EncodedTensor, set[str]]]:
    """Every weight of int8 with its scales, and the names of the stored tensors that it takes up.
    Raises CorruptFileError for parts that do not fit."""
    if not model.stated:
        return  # integers may be something else
    for name, part in model.parts.items():
        if part.tensor.dtype != "I8" or not name.endswith(".weight"):
            continue
        if len(part.tensor.shape) != 2:
            continue
        module = name.removesuffix(".weight")
        rows, columns = part.tensor.shape
        found = {
            "SCB": model.parts.get(f"{module}.SCB"),
            "scale": model.parts.get(f"{name}_scale"),
            "zero_point": model.parts.get(f"{name}_zero_point"),
            "g_idx": model.parts.get(f"{name}_g_idx"),
        }
        others = {key: held for key, held in found.items() if held is not None}
        if "SCB" in others:
            check_shape(name, others["SCB"], (rows,))
        elif "scale" in others:
            _check(name, others, rows, columns)
        else:
            continue
        decode = partial(_decoded, name=name, dtype=torch_dtype(model.dtype))
        stated = {"quant_method": model.stated.get("quant_method")}
        encoded = EncodedTensor.of(name, model.dtype, (rows, columns), part, others, decode, stated)
        left = {f"{module}.weight_format", f"{module}.input_scale"}
        yield encoded, {*encoded.names, *(left & model.parts.keys())}


def _check(name: str, others: Mapping[str, Part], rows: int, columns: int) -> None:
    scale = others["scale"]
    groups = scale.tensor.shape[-1] if len(scale.tensor.shape) == 2 else 1
    shapes = [(rows, groups), *([(1,), (rows,), ()] if groups == 1 else [])]
    check_shape(name, scale, *shapes)
    if not groups or columns % groups:
        raise broken(name, f"{columns} columns with {groups} scales a row")
    if "zero_point" in others:
        check_shape(name, others["zero_point"], scale.tensor.shape)


def _decoded(
    codes: torch.Tensor,
    others: Mapping[str, torch.Tensor],
    *,
    name: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    if "SCB" in others:
        largest = others["SCB"].float()
        if not bool(torch.isfinite(largest).all()):
            raise broken(name, "a scale is not finite")
        return (codes * largest[:, None]).mul_(_STEP).to(dtype)
    checked_scales(name, others["scale"])
    scales = others["scale"]
    scales = scales if scales.dim() == 2 else scales.reshape(-1, 1)
    group = grouped(name, others.get("g_idx"), codes.shape[1], scales.shape[1])
    values = codes.to(scales.dtype)
    if "zero_point" in others:
        values -= others["zero_point"].to(scales.dtype).reshape(scales.shape)[:, group]
    scaled: torch.Tensor = values.mul_(scales[:, group])
    return scaled.to(dtype)
