"""Small random models as GGUF files that llama.cpp runs, with the tokenizer of another file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from safetensors.torch import load_file

import loftq_cli
from loftq_cli.exporting.gguf.file import F16, F32, Field, GgufTensor, header_of, read_gguf
from tests.support import models
from tests.support.gguf_files import name_of, permuted
from tests.whole.llama_cpp.files import written

HEADS = (4, 2)
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS[0],
    "num_key_value_heads": HEADS[1],
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@dataclass(frozen=True)
class Small:
    """A converted model: its ``output``, and ``served``, its export to GGUF."""

    output: Path
    served: Path


def made(place: Path, tokenizer: Path, *, experts: bool) -> Small:
    """A Llama, or a mixture of experts (Qwen3-MoE), at 4 bits."""
    kind = "qwen3moe" if experts else "llama"
    words = _words(tokenizer)
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(words), **({"norm_topk_prob": True} if experts else {})}
    config: Any = (
        transformers.Qwen3MoeConfig(**sizes, **EXPERTS)
        if experts
        else transformers.LlamaConfig(**sizes)
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # words alone are said: the server wants whole characters
        model.lm_head.weight[~words] = 0
    source = models.save(model, place / f"{kind}-source")
    skeleton = _skeleton(source, place / f"{kind}.gguf", tokenizer, kind)
    output, served = place / f"{kind}-out", place / f"{kind}-served"
    settings: dict[str, Any] = {"include": ("*.experts.*",)} if experts else {}
    loftq_cli.convert(
        source,
        output,
        bits=4,
        method="uniform-symmetric",
        block_size=32,
        layout="compressed",
        rank=8,
        iters=2,
        threads=1,
        **settings,
    )
    loftq_cli.export(output, served, layout="gguf", skeleton=skeleton, source=source, strict=True)
    return Small(output, served)


def _words(tokenizer: Path) -> torch.Tensor:
    """bool (vocabulary,): which tokens are letters, perhaps after a space."""
    field = gguf.GGUFReader(tokenizer).fields["tokenizer.ggml.tokens"]
    texts = [bytes(field.parts[place]).decode() for place in field.data]
    return torch.tensor([bool(re.fullmatch("Ġ?[a-z]+", text)) for text in texts])


def _skeleton(source: Path, path: Path, tokenizer: Path, kind: str) -> Path:
    held = read_gguf(tokenizer).fields
    fields = {name: field for name, field in held.items() if name.startswith("tokenizer.")}
    fields |= _hyperparameters(kind)
    tensors = _tensors(load_file(source / "model.safetensors"), kind)
    kinds = {
        name: F32 if value.dim() == 1 or "gate_inp" in name else F16
        for name, value in tensors.items()
    }
    entries = [GgufTensor(name, kinds[name], tuple(value.shape)) for name, value in tensors.items()]
    values = [v.half() if kinds[name] is F16 else v.float() for name, v in tensors.items()]
    return written(path, header_of(fields, entries), values)


def _hyperparameters(kind: str) -> dict[str, Field]:
    numbers = {
        "block_count": SIZES["num_hidden_layers"],
        "context_length": SIZES["max_position_embeddings"],
        "embedding_length": SIZES["hidden_size"],
        "feed_forward_length": SIZES["intermediate_size"],
        "attention.head_count": HEADS[0],
        "attention.head_count_kv": HEADS[1],
        "attention.key_length": SIZES["head_dim"],
        "attention.value_length": SIZES["head_dim"],
        "rope.dimension_count": SIZES["head_dim"],
    }
    if kind == "qwen3moe":
        numbers |= {
            "expert_count": EXPERTS["num_experts"],
            "expert_used_count": EXPERTS["num_experts_per_tok"],
            "expert_feed_forward_length": EXPERTS["moe_intermediate_size"],
        }
    floats = {"attention.layer_norm_rms_epsilon": SIZES["rms_norm_eps"], "rope.freq_base": 1e4}
    return {
        "general.architecture": Field.text(kind),
        **{f"{kind}.{name}": Field.number(4, value) for name, value in numbers.items()},
        **{f"{kind}.{name}": Field.number(6, value) for name, value in floats.items()},
    }


def _tensors(held: Mapping[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Under llama.cpp's names: rows of q and k permuted for a Llama, experts stacked."""
    found: dict[str, torch.Tensor] = {}
    stacks: dict[str, list[torch.Tensor]] = {}
    for name, tensor in held.items():
        block = name.split(".")[2] if name.startswith("model.layers.") else ""
        if ".mlp.experts." in name:
            leaf = name.split(".")[-2].removesuffix("_proj")
            stacks.setdefault(f"blk.{block}.ffn_{leaf}_exps.weight", []).append(tensor)
        elif name.endswith(".mlp.gate.weight"):
            found[f"blk.{block}.ffn_gate_inp.weight"] = tensor
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            found[f"blk.{block}.attn_{name.split('.')[-2]}.weight"] = tensor
        elif kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            found[name_of(name)] = permuted(tensor, HEADS["k_proj" in name])
        else:
            found[name_of(name)] = tensor
    return {**found, **{name: torch.stack(parts) for name, parts in stacks.items()}}
