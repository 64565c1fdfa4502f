"""What the consumers should see: Q and scaling * B @ A, from the bytes of the output."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from loftq_cli.layouts.base import Matrix
from loftq_cli.layouts.registry import layout_of
from tests.whole.interop.cases import Case
from tests.whole.interop.consumer import outputs


@dataclass(frozen=True)
class Output:
    """A finished conversion of ``case`` from ``source``."""

    case: Case
    source: Path
    directory: Path
    manifest: dict[str, Any]

    @functools.cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the backbone, by name."""
        found: dict[str, torch.Tensor] = {}
        for file in sorted(self.directory.glob("*.safetensors")):
            found |= load_file(file)
        return found

    def matrices(self) -> list[Matrix]:
        return [
            Matrix(
                entry["name"],
                tuple(entry["shape"]),
                entry["dtype"],
                entry["method"],
                entry["bits"],
                entry["block_size"],
            )
            for entry in self.manifest["matrices"]
        ]

    def backbone(self) -> dict[str, torch.Tensor]:
        """Q (out, in), float32, by module."""
        layout = layout_of({"layout": self.case.layout}, self.manifest["recipe"])
        return {matrix.module: layout.decode(matrix, self.tensors) for matrix in self.matrices()}

    def deltas(self) -> dict[str, torch.Tensor]:
        """scaling * B @ A (out, in), float32, by module, as PEFT's documentation defines it."""
        folder = self.directory / "loftq_init"
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        deltas = {}
        for matrix in self.matrices():
            stem = f"base_model.model.{matrix.module}"
            a = tensors[f"{stem}.lora_A.weight"].float()
            b = tensors[f"{stem}.lora_B.weight"].float()
            rank = _pattern(config["rank_pattern"], matrix.module, config["r"])
            alpha = _pattern(config["alpha_pattern"], matrix.module, config["lora_alpha"])
            assert a.shape[0] == rank
            deltas[matrix.module] = (alpha / rank) * (b @ a)
        return deltas

    def dense_outputs(self) -> torch.Tensor:
        """The outputs, float32, of the source's architecture carrying Q + scaling * B @ A."""
        model_class = getattr(transformers, self.case.model_class)
        model = model_class.from_pretrained(self.source, dtype=torch.float32)
        deltas = self.deltas()
        with torch.no_grad():
            for module, backbone in self.backbone().items():
                model.get_submodule(module).weight.copy_(backbone + deltas[module])
            return outputs(model, model.config)


def _pattern(patterns: dict[str, Any], module: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default
