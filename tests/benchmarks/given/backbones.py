"""Quantized checkpoints of the model as other libraries make them, without an adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.tools import convert

GROUP = 64  # 576, the width of SmolLM2, is no multiple of 128
_CALIBRATED = 32  # windows of 512 tokens


def _rounded(bits: int) -> Callable[[Path, Path, torch.Tensor], None]:
    """Round to nearest, scales from the largest magnitudes, as a GPTQ checkpoint."""

    def make(model: Path, target: Path, windows: torch.Tensor) -> None:
        whole = target.with_name(f"{target.name}-whole")
        options = ("--layout", "gptq", "--bits", str(bits), "--block-size", str(GROUP))
        convert(model, whole, *options, "--scale", "absmax", "--iters", "0", "--rank", "1")
        target.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(whole / name, target / name)
        shutil.rmtree(whole)

    return make


def _gptq(bits: int) -> Callable[[Path, Path, torch.Tensor], None]:
    """By gptqmodel's own GPTQ, columns in the order of their activations."""

    def make(model: Path, target: Path, windows: torch.Tensor) -> None:
        from gptqmodel import GPTQModel, QuantizeConfig

        config = QuantizeConfig(bits=bits, group_size=GROUP, desc_act=True, act_group_aware=False)
        loaded = GPTQModel.load(str(model), config, device="cpu")
        given = [
            {"input_ids": window[None], "attention_mask": torch.ones_like(window)[None]}
            for window in windows[:_CALIBRATED]
        ]
        loaded.quantize(given, batch_size=1)
        loaded.save(str(target))

    return make


def _nf4(model: Path, target: Path, windows: torch.Tensor) -> None:
    """By bitsandbytes, double-quantized, as QLoRA's backbones are published."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    loaded.save_pretrained(target)


BACKBONES: Mapping[str, Callable[[Path, Path, torch.Tensor], None]] = {
    "rtn-2": _rounded(2),
    "rtn-3": _rounded(3),
    "rtn-4": _rounded(4),
    "gptq-2": _gptq(2),
    "gptq-4": _gptq(4),
    "nf4": _nf4,
}


def prepare(name: str, model: Path, work: Path, windows: torch.Tensor) -> Path:
    """The backbone NAME in ``work``, made unless it is there; ``windows`` int64 (count, 512) is
    what it may be calibrated on."""
    target = work / "backbones" / name
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        BACKBONES[name](model, target, windows)
    return target
