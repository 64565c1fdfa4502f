"""bitsandbytes 4 bit: ``X.weight`` uint8 (n/2, 1), the first of two codes in the high nibble;
``X.weight.quant_map`` float32 (16,); ``X.weight.absmax`` float32 (blocks,), or uint8 with a map and
scales of its own (``nested_…``); ``X.weight.quant_state.bitsandbytes__nf4`` (or fp4), JSON.
(bitsandbytes ``QuantState``.)"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from loftq_cli.checkpoint.decoding.parts import Model, broken
from loftq_cli.checkpoint.dtypes import FLOATS, tag_named, torch_dtype
from loftq_cli.checkpoint.encoded import EncodedTensor

NAME = "bitsandbytes, 4 bit"
_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_OTHERS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def find(model: Model) -> Iterator[tuple[EncodedTensor, set[str]]]:
    """Every 4-bit weight, and the names of the stored tensors that it takes up. Raises
    CorruptFileError for one whose parts do not fit."""
    for stored, state_part in model.parts.items():
        suffix = next((s for s in _STATES if stored.endswith(s)), None)
        if suffix is None:
            continue
        name = stored.removesuffix(suffix)
        part = model.parts.get(name)
        if part is None or part.tensor.dtype != "U8":
            raise broken(name, "its codes are missing, or no bytes")
        others = {
            key: model.parts[f"{name}.{key}"] for key in _OTHERS if f"{name}.{key}" in model.parts
        }
        if not {"absmax", "quant_map"} <= others.keys():
            raise broken(name, "absmax or quant_map is missing")
        state = _state(name, bytes(model.read(state_part).tolist()))
        shape = tuple(state["shape"])
        if part.tensor.elements != -(-math.prod(shape) // 2):
            raise broken(name, f"{part.tensor.elements} bytes of codes for {list(shape)}")
        tag = tag_named(state["dtype"])
        decode = partial(_decoded, name=name, state=state, dtype=torch_dtype(tag))
        encoded = EncodedTensor.of(name, tag, shape, part, others, decode, beside=(stored,))
        yield encoded, set(encoded.names)


def _state(name: str, raw: bytes) -> dict[str, Any]:
    """The quantization state, checked. Raises CorruptFileError."""
    try:
        state = json.loads(raw)
        shape, size = state["shape"], state["blocksize"]
        whole = [*shape, size, state.get("nested_blocksize", 1)]
        sound = all(type(n) is int and n > 0 for n in whole) and tag_named(state["dtype"]) in FLOATS
    except (ValueError, LookupError, TypeError):
        sound = False
    if not sound:
        raise broken(name, "its quant_state is damaged")
    return dict(state)


def _decoded(
    codes: torch.Tensor,
    others: Mapping[str, torch.Tensor],
    *,
    name: str,
    state: Mapping[str, Any],
    dtype: torch.dtype,
) -> torch.Tensor:
    absmax = others["absmax"]
    if absmax.dtype == torch.uint8:
        if not {"nested_absmax", "nested_quant_map"} <= others.keys():
            raise broken(name, "nested_absmax or nested_quant_map is missing")
        size = int(state["nested_blocksize"])
        levels = others["nested_quant_map"][absmax.int()]
        nested = others["nested_absmax"].repeat_interleave(size)[: absmax.numel()]
        absmax = levels * nested + float(state["nested_offset"])
    if not bool(torch.isfinite(absmax).all()):
        raise broken(name, "a scale is not finite")
    flat, size = codes.flatten(), int(state["blocksize"])
    count = math.prod(state["shape"])
    index = torch.stack((flat >> 4, flat & 15), dim=1).flatten()[:count].int()
    if absmax.numel() != -(-count // size):
        raise broken(name, f"{absmax.numel()} scales for {count} values in blocks of {size}")
    values = others["quant_map"][index] * absmax.repeat_interleave(size)[:count]
    return values.to(dtype).view(tuple(state["shape"]))
