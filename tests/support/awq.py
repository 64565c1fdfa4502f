"""A textbook AWQ (arXiv:2306.00978) in float64: scales, rounding to nearest, gemm packing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support import given

Tensors = dict[str, torch.Tensor]
Fronts = Mapping[str, Iterable[str]]
"""The module in front of others, with a star for the number of the block, and those."""

GATED: Fronts = {
    "model.layers.*.input_layernorm": [f"self_attn.{each}_proj" for each in "qkv"],
    "model.layers.*.post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    "model.layers.*.mlp.up_proj": ["mlp.down_proj"],
}
"""Of Llama, where keys and values have fewer heads."""
WHOLE: Fronts = {**GATED, "model.layers.*.self_attn.v_proj": ["self_attn.o_proj"]}
"""Where they have as many."""
GROUP = 32
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def rescaled(
    tensors: Tensors, fronts: Fronts, *, offset: float = 0.0, spread: float = 0.5, seed: int = 0
) -> Tensors:
    """``tensors``, in float64, that compute the same: what is in front is divided by s, drawn with
    the deviation ``spread`` of its logarithm, and columns are multiplied by it. ``offset``: what
    norms add to their weights."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: tensor.double() for name, tensor in tensors.items()}
    for front, behind in fronts.items():
        for name in tensors:
            match = re.fullmatch(rf"({re.escape(front)})\.weight".replace(r"\*", r"(\d+)"), name)
            if match is None:
                continue
            weights = [f"{front.split('*')[0]}{match[2]}.{each}.weight" for each in behind]
            size = found[weights[0]].shape[1]
            s = (torch.randn(size, generator=generator, dtype=torch.float64) * spread).exp()
            if found[name].dim() == 1:
                found[name] = (found[name] + offset) / s - offset
            else:  # the last rows, of a layer that is two in one
                rows = torch.ones(len(found[name]), dtype=torch.float64)
                rows[-size:] = s
                found[name] = found[name] / rows[:, None]
            if f"{match[1]}.bias" in found:
                found[f"{match[1]}.bias"] = found[f"{match[1]}.bias"] / s
            found |= {each: found[each] * s for each in weights}
    return found


def rounded(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """The gemm tensors of ``weight`` (out, in), 4 bits with a zero point for each GROUP of a row,
    and what they mean, float64, rounded to the float16 that it is computed in."""
    rows, columns = weight.shape
    groups = weight.double().view(rows, -1, GROUP)
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scales = ((high - low) / 15).half().double()
    zeros = (-low / scales).round().clamp(0, 15)
    codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
    meant = ((codes - zeros[..., None]) * scales[..., None]).half().double()
    parts = {
        "qweight": _words(codes.view(rows, columns).T),
        "qzeros": _words(zeros.T),
        "scales": scales.T.half().contiguous(),
    }
    return parts, meant.view(rows, columns)


def _words(codes: torch.Tensor) -> torch.Tensor:
    """Eight codes of a row in each int32."""
    eights = codes.long().view(len(codes), -1, 8)[..., list(_ORDER)]
    words = (eights << (torch.arange(8) * 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int().contiguous()


def checkpoint(
    source: Path, target: Path, tensors: Tensors, dtype: torch.dtype = torch.float16
) -> tuple[Path, Tensors]:
    """``tensors``, rescaled or not, as an AWQ checkpoint of the model in ``source``, and what its
    tensors mean, in float64."""
    held: Tensors = {}
    meant: Tensors = {}
    for name, tensor in tensors.items():
        if re.search(r"\.(?:layers|h)\.\d+\.", name) and tensor.dim() == 2:
            parts, meant[name] = rounded(tensor)
            held |= {f"{name.removesuffix('.weight')}.{key}": part for key, part in parts.items()}
        else:
            held[name] = tensor.to(dtype).contiguous()
            meant[name] = held[name].double()
    stated: Any = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "version": "gemm",
        "zero_point": True,
    }
    return given.of(source, target, held, stated), meant


def whole(output: Path, held: Tensors) -> Tensors:
    """What the backbone's tensors ``held`` mean with the adapter in ``output``, float64."""
    pairs = load_file(output / "adapter_model.safetensors")
    found = dict(held)
    for name in held:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in pairs:
            lora_A, lora_B = (pairs[f"{module}.lora_{side}.weight"].double() for side in "AB")
            found[name] = held[name] + lora_B @ lora_A
    return found
