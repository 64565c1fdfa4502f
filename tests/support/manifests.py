"""Manifests of models too large to convert here: the shapes are real, the figures drawn."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loftq_cli.version import VERSION

_HASH = "ab" * 32
# Llama-2-70B.
_HIDDEN, _INNER, _KEYS, _VOCABULARY, _LAYERS = 8192, 28672, 1024, 32000, 80
_ATTENTION = {
    "q_proj": (_HIDDEN, _HIDDEN),
    "k_proj": (_KEYS, _HIDDEN),
    "v_proj": (_KEYS, _HIDDEN),
    "o_proj": (_HIDDEN, _HIDDEN),
}
_MLP = {
    "gate_proj": (_INNER, _HIDDEN),
    "up_proj": (_INNER, _HIDDEN),
    "down_proj": (_HIDDEN, _INNER),
}


def large(
    layers: int = _LAYERS, experts: int = 0, *, weighted: bool = True, bits: int = 2, rank: int = 64
) -> dict[str, Any]:
    """Of Llama-2-70B with so many ``layers``, its MLP in the place of each of ``experts``."""
    draw = random.Random(layers + experts + bits)
    records = [_record(*each, draw, weighted, bits, rank) for each in _matrices(layers, experts)]
    elements = sum(math.prod(record["shape"]) for record in records)
    backbone = sum(math.prod(r["shape"]) * r["bits_per_weight"] / 8 for r in records)
    adapter = sum(sum(r["shape"]) * r["rank"] * 2 for r in records)
    weight = math.fsum(r["frobenius"]["weight"] ** 2 for r in records)
    total = {
        name: math.sqrt(math.fsum(r["frobenius"][name] ** 2 for r in records) / weight)
        for name in ("quantized", "final")
    }
    kept = 2 * _VOCABULARY * _HIDDEN
    return {
        "format_version": 1,
        "tool": {"name": "loftq-cli", "version": VERSION},
        "source": {
            "id": "meta-llama/Llama-2-70b-hf",
            "revision": "c0ffee",
            "files": [{"name": "model.safetensors", "size": 1, "sha256": _HASH}],
        },
        "recipe": _recipe(bits, rank),
        "fingerprint": _HASH,
        "matrices": records,
        "passed_through": [
            {"name": name, "shape": [_VOCABULARY, _HIDDEN], "dtype": "BF16", "reason": reason}
            for name, reason in (("lm_head.weight", "head"), ("model.embed.weight", "embedding"))
        ],
        "totals": {
            "parameters": elements + kept,
            "source_bytes": 2 * (elements + kept),
            "backbone_bytes": round(backbone) + 2 * kept,
            "adapter_bytes": adapter,
            "bits_per_weight": backbone * 8 / elements,
            "relative_residual": total["final"],
            "relative_residual_quantized": total["quantized"],
        },
        "outputs": [
            {"name": name, "size": 1, "sha256": _HASH}
            for name in ("loftq_init/adapter_model.safetensors", "model.safetensors")
        ],
        "environment": {
            "torch": "2.13.0",
            "device": "cuda",
            "seconds": 1.0,
            "peak_host_bytes": 1,
            "peak_device_bytes": 1,
        },
    }


def refined(blocks: int) -> dict[str, Any]:
    """What a manifest tells of a refinement of so many blocks."""
    rates = {"pair": 4e-3, "scales": 2e-3, "codes": 1e-2}
    settings = {"samples": 8, "length": 16, "epochs": 1, "end_to_end": 0, "seed": 0, "batch": 4}
    rest = {"block_rates": rates, "whole_rates": rates, "revision": 1}
    return {
        "fingerprint": _HASH,
        "texts": [_HASH],
        "adapter": None,
        "settings": {**settings, **rest},
        "samples": 8,
        "length": 16,
        "tokens": 128,
        "held": 1,
        "blocks": [
            {
                "name": f"model.layers.{number}",
                "before": 2.0,
                "after": 1.0,
                "held_before": 2.0 + number,
                "held_after": 1.5,
                "steps": 4,
                "kept": 4,
                "finite": True,
            }
            for number in range(blocks)
        ],
    }


def write(directory: Path, manifest: dict[str, Any]) -> Path:
    """A directory that holds this manifest and nothing else, which is all that reports read."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "loftq_manifest.json").write_text(json.dumps(manifest))
    return directory


def _matrices(layers: int, experts: int) -> Iterator[tuple[str, tuple[int, int], float]]:
    """Name, shape, and how deep: 0 to 1."""
    for layer in range(layers):
        path, depth = f"model.layers.{layer}", layer / max(layers - 1, 1)
        for name, shape in _ATTENTION.items():
            yield f"{path}.self_attn.{name}", shape, depth
        for place in [f"experts.{n}." for n in range(experts)] or [""]:
            for name, shape in _MLP.items():
                yield f"{path}.mlp.{place}{name}", shape, depth


def _record(
    module: str,
    shape: tuple[int, int],
    depth: float,
    draw: random.Random,
    weighted: bool,
    bits: int,
    rank: int,
) -> dict[str, Any]:
    weight = 0.02 * math.sqrt(math.prod(shape))
    alone = (0.36 + 0.1 * depth * draw.random()) * 4.0 ** (2 - bits)
    final = alone * (0.7 + 0.2 * draw.random())
    steps = [weight * (final + (alone - final) * 0.5**step) for step in range(1, 5)]
    record: dict[str, Any] = {
        "name": f"{module}.weight",
        "module": module,
        "shape": list(shape),
        "dtype": "BF16",
        "method": "uniform",
        "bits": bits,
        "block_size": 64,
        "rank": rank,
        "layout": "gptq",
        "bits_per_weight": bits + 0.28125,
        "step": 5,
        "frobenius": {
            "weight": weight,
            "quantized": weight * alone,
            "steps": [*steps, weight * final],
            "final": weight * final,
        },
    }
    if weighted:
        share = 0.3 + 0.5 * draw.random()
        record["weighted"] = {
            "kind": "diagonal",
            **{name: value for name, value in record["frobenius"].items() if name != "steps"},
            "final": weight * final * share,
            "steps": [value * share for value in record["frobenius"]["steps"]],
        }
    return record


def _recipe(bits: int, rank: int) -> dict[str, Any]:
    return {
        "adapter_dtype": "source",
        "bits": bits,
        "block_size": 64,
        "dense_dtype": "source",
        "device": "cuda",
        "exclude": [],
        "include": [],
        "iters": 5,
        "keep": "best",
        "kernels": "8:native+bfloat16",
        "layout": "gptq",
        "layout_fallback": None,
        "lora_alpha": None,
        "method": "uniform",
        "order": "quantize-first",
        "rank": rank,
        "scale": "mse",
        "seed": 0,
        "svd": "fast",
        "threads": 1,
    }
