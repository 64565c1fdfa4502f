"""Checkpoints of large models that hold headers and no values: plans are made of headers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.checkpoint.writer import index_of, place

Config = dict[str, Any]
SHARD = 4_900_000_000  # bytes

LLAMA_2_70B: Config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
LLAMA_31_405B: Config = {
    **LLAMA_2_70B,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
DEEPSEEK_V3: Config = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "vocab_size": 129280,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}
MODELS = {
    "Llama-2-70B": LLAMA_2_70B,
    "Llama-3.1-405B": LLAMA_31_405B,
    "DeepSeek-V3": DEEPSEEK_V3,
}


def tensors(config: Config) -> Iterator[TensorSpec]:
    """The tensors of the model, in the order of its layers."""
    hidden = config["hidden_size"]
    yield _dense("model.embed_tokens.weight", config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        deepseek = config["model_type"] == "deepseek_v3"
        yield from (_deepseek if deepseek else _llama)(prefix, layer, config)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield _dense(f"{prefix}.{norm}.weight", hidden)
    yield _dense("model.norm.weight", hidden)
    yield _dense("lm_head.weight", config["vocab_size"], hidden)


def _llama(prefix: str, layer: int, config: Config) -> Iterator[TensorSpec]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    for name, rows in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
        yield _dense(f"{prefix}.self_attn.{name}_proj.weight", rows, hidden)
    for name, rows, columns in _mlp(hidden, inner):
        yield _dense(f"{prefix}.mlp.{name}.weight", rows, columns)


def _deepseek(prefix: str, layer: int, config: Config) -> Iterator[TensorSpec]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rope, nope, value = (
        config[key] for key in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    )
    queries, keys = config["q_lora_rank"], config["kv_lora_rank"]
    for name, rows, columns in (
        ("q_a_proj", queries, hidden),
        ("q_b_proj", heads * (rope + nope), queries),
        ("kv_a_proj_with_mqa", keys + rope, hidden),
        ("kv_b_proj", heads * (nope + value), keys),
        ("o_proj", hidden, heads * value),
    ):
        yield from _fp8(f"{prefix}.self_attn.{name}.weight", rows, columns)
    yield _dense(f"{prefix}.self_attn.q_a_layernorm.weight", queries)
    yield _dense(f"{prefix}.self_attn.kv_a_layernorm.weight", keys)
    if layer < config["first_k_dense_replace"]:
        for name, rows, columns in _mlp(hidden, config["intermediate_size"]):
            yield from _fp8(f"{prefix}.mlp.{name}.weight", rows, columns)
        return
    inner, experts = config["moe_intermediate_size"], config["n_routed_experts"]
    yield _dense(f"{prefix}.mlp.gate.weight", experts, hidden)
    yield TensorSpec(f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (experts,))
    for name, rows, columns in _mlp(hidden, inner):
        yield from _fp8(f"{prefix}.mlp.shared_experts.{name}.weight", rows, columns)
        for expert in range(experts):
            yield from _fp8(f"{prefix}.mlp.experts.{expert}.{name}.weight", rows, columns)


def _mlp(hidden: int, inner: int) -> tuple[tuple[str, int, int], ...]:
    return (
        ("gate_proj", inner, hidden),
        ("up_proj", inner, hidden),
        ("down_proj", hidden, inner),
    )


def _dense(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, "BF16", shape)


def _fp8(name: str, rows: int, columns: int) -> Iterator[TensorSpec]:
    yield TensorSpec(name, "F8_E4M3", (rows, columns))
    blocks = (-(-rows // 128), -(-columns // 128))
    yield TensorSpec(f"{name}_scale_inv", "F32", blocks)


def write(directory: Path, config: Config) -> Path:
    """A checkpoint of ``config`` that takes no space: files of their size with a header each."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    groups: list[list[TensorSpec]] = [[]]
    held = 0
    for spec in tensors(config):
        if held + spec.nbytes > SHARD and groups[-1]:
            groups.append([])
            held = 0
        groups[-1].append(spec)
        held += spec.nbytes
    count = len(groups)
    named = {f"model-{n:05d}-of-{count:05d}.safetensors": g for n, g in enumerate(groups, 1)}
    for name, group in named.items():
        header, _ = place(group)
        with (directory / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(spec.nbytes for spec in group))
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_of(named.items())))
    return directory
