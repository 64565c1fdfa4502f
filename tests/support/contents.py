"""What is in an output, read without our own readers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FAST: dict[str, Any] = {"threads": 1, "rank": 4, "iters": 2}

Converter = Callable[..., Path]
"""The output of a conversion of these tensors; the source is beside it, in ``model``."""


def stored(output: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the backbone."""
    found: dict[str, torch.Tensor] = {}
    for path in output.glob("*.safetensors"):
        found.update(load_file(path))
    return found


def manifest(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "loftq_manifest.json").read_bytes()))


def product(output: Path, name: str, scaling: float = 1.0) -> torch.Tensor:
    """scaling * B A, as the consumer of the adapter will compute it, in float64."""
    adapter = load_file(output / "loftq_init/adapter_model.safetensors")
    prefix = f"base_model.model.{name.removesuffix('.weight')}"
    B, A = (adapter[f"{prefix}.lora_{side}.weight"].double() for side in "BA")
    return scaling * B @ A


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
