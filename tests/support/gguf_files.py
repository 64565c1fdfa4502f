"""GGUF files of small Llamas in floating point, as llama.cpp's converter lays them out: with other
names, the rows of q and k permuted, norms in float32."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file

KINDS = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def name_of(name: str) -> str:
    """llama.cpp's name of a Llama's tensor."""
    module = name.removesuffix(".weight")
    if module in _TOP:
        return f"{_TOP[module]}.weight"
    _, _, block, rest = module.split(".", 3)
    return f"blk.{block}.{_NAMES[rest]}.weight"


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q or k as llama.cpp has them (LlamaModel.permute)."""
    rows = weight.shape[0] // heads // 2
    turned = weight.view(heads, 2, rows, *weight.shape[1:]).swapaxes(1, 2)
    return turned.reshape(weight.shape)


def write(path: Path, tensors: Mapping[str, torch.Tensor], fields: Mapping[str, Any] = {}) -> Path:
    """A file with these tensors, by gguf's own writer; bfloat16 as raw bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    for name, tensor in tensors.items():
        raw = tensor.contiguous()
        if raw.dtype == torch.bfloat16:
            shape = [*raw.shape[:-1], 2 * raw.shape[-1]]  # in bytes, as the writer wants it
            held = raw.view(torch.uint8).view(shape).numpy()
            writer.add_tensor(name, held, raw_dtype=KINDS[torch.bfloat16])
        else:
            writer.add_tensor(name, raw.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def skeleton(
    source: Path,
    path: Path,
    heads: tuple[int, int],
    dtype: torch.dtype = torch.float16,
    instead: Mapping[str, torch.Tensor] = {},
) -> Path:
    """The GGUF file of the Llama in ``source``, with ``heads`` of q and of k. The tensors
    ``instead`` are there in the place of the model's."""
    found = {}
    held = load_file(source / "model.safetensors")
    for name, tensor in {**held, **instead}.items():
        value = tensor.float()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value = permuted(value, heads["k_proj" in name])
        found[name_of(name)] = value if value.dim() == 1 else value.to(dtype)
    return write(path, found, {"tokenizer.ggml.tokens": ["a", "b"], "llama.block_count": 2})


def field(name: str, kind: int, raw: bytes) -> bytes:
    """A field of a header, as it is in a file."""
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + raw
