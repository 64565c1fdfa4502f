"""Peak memory of a conversion: 1 GB and 4 GB checkpoints of the same matrix sizes.

Llama-2-7b's shapes in bfloat16, random values, three and ten layers. Every conversion runs in a
process of its own; its peak is compared with that of a process that only imports torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.checkpoint.writer import GrowingShard
from tests.benchmarks.tools import convert, table

_HIDDEN, _INNER = 4096, 11008
_LAYERS = (3, 10)
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": _HIDDEN,
    "intermediate_size": _INNER,
    "num_attention_heads": 32,
}


def main() -> None:
    base = _import_only()
    largest = _HIDDEN * _INNER * 4
    rows = []
    peaks = []
    for layers in _LAYERS:
        with tempfile.TemporaryDirectory() as scratch:
            model = Path(scratch) / "model"
            size = write_model(model, layers)
            manifest = convert(
                model, Path(scratch) / "out", "--bits", "2", "--rank", "64", "--iters", "1"
            )
            environment = manifest["environment"]
            peaks.append(environment["peak_host_bytes"])
            above = peaks[-1] - base
            rows.append(
                [
                    str(layers),
                    f"{size / 1e9:.2f} GB",
                    f"{peaks[-1] / 1e6:.0f} MB",
                    f"{above / 1e6:.0f} MB",
                    f"{above / largest:.2f}",
                    f"{environment['seconds']:.0f} s",
                ]
            )
    table(
        ("layers", "checkpoint", "peak", "above importing torch", "largest matrix in fp32", "time"),
        rows,
    )
    print(f"\npeaks differ by {max(peaks) / min(peaks) - 1:.1%}")


def write_model(directory: Path, layers: int) -> int:
    """A sharded random checkpoint, one shard per layer; its size in bytes."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**_CONFIG, "num_hidden_layers": layers}))
    weight_map = {}
    total = 0
    for layer in range(layers):
        name = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        specs = list(_layer(layer))
        with GrowingShard(directory / name, specs) as shard:
            for spec in specs:
                generator = torch.Generator().manual_seed(layer)
                values = torch.randn(spec.shape, generator=generator, dtype=torch.float32) * 0.02
                shard.write(spec.name, values.bfloat16())
                weight_map[spec.name] = name
                total += spec.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _layer(number: int) -> Iterator[TensorSpec]:
    prefix = f"model.layers.{number}"
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield TensorSpec(f"{prefix}.self_attn.{name}.weight", "BF16", (_HIDDEN, _HIDDEN))
    for name in ("gate_proj", "up_proj"):
        yield TensorSpec(f"{prefix}.mlp.{name}.weight", "BF16", (_INNER, _HIDDEN))
    yield TensorSpec(f"{prefix}.mlp.down_proj.weight", "BF16", (_HIDDEN, _INNER))


def _import_only() -> int:
    code = (
        "import torch; from loftq_cli.machine.peak_memory import peak_host_bytes; "
        "print(peak_host_bytes())"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return int(result.stdout)
