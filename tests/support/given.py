"""Quantized checkpoints without an adapter, as somebody else's: made by the libraries themselves
where they are installed, or by packing by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

import loftq_cli
from tests.support import checkpoints
from tests.support.encoded import is_linear

Tensors = dict[str, torch.Tensor]


def stripped(output: Path, target: Path) -> Path:
    """The backbone of a conversion as if another program had written it."""
    target.mkdir()
    for file in output.iterdir():
        if file.suffix in (".safetensors", ".json") and file.name != "loftq_manifest.json":
            shutil.copy(file, target / file.name)
    return target


def quantized(source: Path, target: Path, layout: str, bits: int = 4, **settings: Any) -> Path:
    """A backbone in the form of ``layout``, of somebody else's."""
    whole = target.with_name(f"{target.name}-whole")
    made = {"bits": bits, "layout": layout, "rank": 1, "iters": 0, "threads": 1, **settings}
    loftq_cli.convert(source, whole, **made)
    return stripped(whole, target)


def in_another_order(directory: Path, seed: int = 0) -> Path:
    """The GPTQ checkpoint in ``directory`` as with desc_act: groups of columns all over a row."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, index in tensors.items():
        if name.endswith(".g_idx"):
            drawn = torch.randperm(len(index), generator=generator)
            tensors[name] = index[drawn].contiguous()
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def of(source: Path, target: Path, tensors: Tensors, stated: Any) -> Path:
    """A checkpoint of these ``tensors`` with the config of ``source`` and ``stated`` in it."""
    config = json.loads((source / "config.json").read_text())
    return checkpoints.write(target, tensors, {**config, "quantization_config": stated})


def int8(tensors: Tensors) -> tuple[Tensors, Any]:
    """LLM.int8(), as bitsandbytes stores it."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if is_linear(name, tensor):
            largest = tensor.float().abs().amax(dim=1)
            codes = (tensor.float() / largest[:, None] * 127).round().to(torch.int8)
            module = name.removesuffix(".weight")
            found |= {name: codes, f"{module}.SCB": largest}
            found[f"{module}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
        else:
            found[name] = tensor
    return found, {"quant_method": "bitsandbytes", "load_in_8bit": True}
