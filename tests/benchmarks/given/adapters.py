"""The model with a backbone's values and an adapter: none, EoRA's, or ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.output import open_output
from loftq_cli.checkpoint.source import open_source
from loftq_cli.checkpoint.stored import read
from loftq_cli.layouts.base import matrix_of
from loftq_cli.layouts.registry import layout_of

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""A (rank, in) and B (out, rank) by module."""


def values(adapted: Path) -> dict[str, torch.Tensor]:
    """{module: Q float32} of a backbone that lies in ``adapted``."""
    output, stored = open_output(adapted), open_source(adapted).stored
    found = {}
    for record in output.records:
        matrix = matrix_of(record)
        layout = layout_of(record, output.manifest["recipe"])
        tensors = {s.name: read(adapted, stored, s) for s in layout.specs(matrix)}
        found[matrix.module] = layout.decode(matrix, tensors)
    return found


def pairs(adapted: Path) -> Pairs:
    """The adapter of ``adapted``."""
    from safetensors.torch import load_file

    stored = load_file(adapted / "loftq_init/adapter_model.safetensors")
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in stored}
    return {
        module: (
            stored[f"base_model.model.{module}.lora_A.weight"].float(),
            stored[f"base_model.model.{module}.lora_B.weight"].float(),
        )
        for module in modules
    }


def eora(
    weights: dict[str, torch.Tensor],
    held: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    rank: int,
) -> Pairs:
    """gptqmodel's EoRA (arXiv:2410.21271) on the moments that ours is made under, in 16 bits."""
    from gptqmodel.eora.eora import eora_compute_lora

    found = {}
    for name, values in held.items():
        lost = (weights[name] - values).float()
        lora_A, lora_B = eora_compute_lora(
            lost, name, moments[name], rank, torch.bfloat16, torch.device("cpu")
        )
        found[name] = lora_A.float(), lora_B.float()
    return found


def model(original: Path, held: dict[str, torch.Tensor], adapter: Pairs | None, rank: int) -> Any:
    """A PeftModel in float32: the values of the backbone, and the adapter, or LoRA's own start."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    with torch.no_grad():
        for name, value in held.items():
            backbone.get_submodule(name).weight.copy_(value)
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=sorted(held))
    found = get_peft_model(backbone, config)
    with torch.no_grad():
        for name, (lora_A, lora_B) in (adapter or {}).items():
            layer = found.get_base_model().get_submodule(name)
            layer.lora_A["default"].weight.copy_(lora_A)
            layer.lora_B["default"].weight.copy_(lora_B)
    return found
