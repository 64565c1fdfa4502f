"""Embeddings and transposed layers in layout ``loftq``: bytes worked by hand from
docs/output-format.md, for weights that the codes hold exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loftq_cli
from tests.support import checkpoints

GPT2 = {"architectures": ["GPT2Model"], "model_type": "gpt2"}
# Three rows of 32 codes of 2 bits, which are repetitions of four: eight bytes of one value each.
CODES = [[0, 1, 2, 3] * 8, [3, 2, 1, 0] * 8, [0, 0, 3, 3] * 8]
BYTES = [0b11_10_01_00] * 8 + [0b00_01_10_11] * 8 + [0b11_11_00_00] * 8
SCALES = [0.5, 2.0, 1.0]  # a row is a block
EXACT = {"bits": 2, "block_size": 32, "scale": "absmax", "iters": 0}
SETTINGS: dict[str, Any] = {**EXACT, "rank": 2, "layout": "loftq", "threads": 1}
NF2 = [-1.0, 0.0, 0.33791524171829224, 1.0]  # QLoRA's construction, as bitsandbytes has it
EXPECTED: dict[str, tuple[list[list[float]], dict[str, list[float]]]] = {
    "nf": (
        [[NF2[code] * scale for code in row] for row, scale in zip(CODES, SCALES)],
        {"weight_levels": NF2},
    ),
    "uniform": (
        [[(code - 1) * scale for code in row] for row, scale in zip(CODES, SCALES)],
        {"weight_zeros": [0b01_01_01]},
    ),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("wte.weight", "embedding"), ("h.0.mlp.c_fc.weight", "conv1d"), ("h.0.proj.weight", None)],
)
@pytest.mark.parametrize("method", ["nf", "uniform"])
def test_golden_bytes(name: str, kind: str | None, method: str, tmp_path: Path) -> None:
    values, further = EXPECTED[method]
    weight = torch.tensor(values)
    source = {name: weight.T.contiguous() if kind == "conv1d" else weight}
    manifest = loftq_cli.convert(
        checkpoints.write(tmp_path / "model", source, GPT2),
        output=tmp_path / "out",
        method=method,
        embeddings=kind == "embedding",
        **SETTINGS,
    )
    module = name.removesuffix(".weight")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    expected = {"weight": BYTES, "weight_scales": SCALES, **further}
    assert stored.keys() == {f"{module}.{key}" for key in expected}
    for key, value in expected.items():
        # Computed levels differ from the published ones in the last bits.
        tolerance = 1e-6 if key == "weight_levels" else 0
        assert stored[f"{module}.{key}"].tolist() == pytest.approx(value, rel=0, abs=tolerance)
    assert stored[name].dtype == torch.uint8
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["modules"][module] == {
        "bits": 2,
        "block_size": 32,
        "decoding": "affine" if method == "uniform" else "codebook",
        **({"kind": kind} if kind else {}),
    }
    (record,) = manifest["matrices"]
    assert (record["shape"], record.get("kind")) == ([3, 32], kind)
    # Of an embedding the two sides are the other way round.
    adapter = load_file(tmp_path / "out" / "loftq_init" / "adapter_model.safetensors")
    suffixes = ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ()
    a, b = suffixes or ("lora_A.weight", "lora_B.weight")
    shapes = [list(adapter[f"base_model.model.{module}.{suffix}"].shape) for suffix in (a, b)]
    assert shapes == ([[2, 3], [32, 2]] if kind == "embedding" else [[2, 32], [3, 2]])
