"""Handmade checkpoints: random tensors under a model's names, written without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "zeta": [1, {"kept": None}],
    "alpha": "keys keep their order",
}
BERT = {"architectures": ["BertModel"], "model_type": "bert"}
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

Tensors = dict[str, torch.Tensor]


def llama(
    hidden: int = 64,
    intermediate: int = 128,
    layers: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tensors:
    """The tensors of a Llama of this size, embedding, norms and head included."""
    draw = _drawer(dtype, seed)
    tensors = {"model.embed_tokens.weight": draw(24, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for module in ATTENTION:
            tensors[f"{prefix}.{module}.weight"] = draw(hidden, hidden)
        for module, shape in zip(
            MLP, ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
        ):
            tensors[f"{prefix}.{module}.weight"] = draw(*shape)
        tensors[f"{prefix}.input_layernorm.weight"] = draw(hidden)
    return tensors | {"model.norm.weight": draw(hidden), "lm_head.weight": draw(24, hidden)}


def bert(hidden: int = 64, layers: int = 1, seed: int = 0) -> Tensors:
    """Some of the tensors of a bare BertModel: two matrices a block, biases, embedding, pooler."""
    draw = _drawer(torch.float32, seed)
    tensors = {"embeddings.word_embeddings.weight": draw(24, hidden)}
    for layer in range(layers):
        for module in ("attention.self.query", "intermediate.dense"):
            tensors[f"encoder.layer.{layer}.{module}.weight"] = draw(hidden, hidden)
            tensors[f"encoder.layer.{layer}.{module}.bias"] = draw(hidden)
    return tensors | {"pooler.dense.weight": draw(hidden, hidden)}


def matrices(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The names that are linear layers of a block."""
    return [name for name, tensor in tensors.items() if ".layer" in name and tensor.ndim == 2]


def write(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] = LLAMA,
    cuts: Sequence[int] = (),
) -> Path:
    """Write a checkpoint; ``cuts`` are the positions in ``tensors`` where a new shard begins."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    bounds = [0, *cuts, len(names)]
    groups = [names[start:stop] for start, stop in pairwise(bounds)]
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        file = file if cuts else "model.safetensors"
        save_file({name: tensors[name].contiguous() for name in group}, directory / file)
        weight_map.update(dict.fromkeys(group, file))
    if cuts:
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def files(directory: Path) -> dict[str, bytes]:
    """Every file below ``directory``, by relative path."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def comparable(output: Path) -> dict[str, Any]:
    """The files of an output, with a manifest that lacks what may differ between two runs."""
    found: dict[str, Any] = files(output)
    manifest = json.loads(found["loftq_manifest.json"])
    del manifest["environment"], manifest["source"]["id"]
    return found | {"loftq_manifest.json": manifest}


def _drawer(dtype: torch.dtype, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.1).to(dtype)

    return draw
