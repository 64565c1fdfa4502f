"""``make mlx-check``, the half that runs where mlx-lm is: what MLX makes of an export.

Reads jobs, JSON, from the file it is given, and writes one .npz for each: the logits of every
prompt, in the model's dtype and in float32, and, of every quantized layer, its values.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm import load, utils


def values(model: Any) -> dict[str, Any]:
    """MLX's own decoder, in float32 instead of the scales' dtype, which rounds what it gives."""
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, kinds):
            parts = (layer.scales.astype(mx.float32), layer.biases.astype(mx.float32))
            decoded = mx.dequantize(
                layer.weight, *parts, group_size=layer.group_size, bits=layer.bits
            )
            place = name.removesuffix(".linear").removesuffix(".embedding")  # under its LoRA layer
            found[f"values:{place}"] = np.array(decoded)
    return found


def answered(job: dict[str, Any]) -> dict[str, Any]:
    if job.get("tokenizer", True):
        model, _ = load(job["model"], adapter_path=job.get("adapter"))
    else:
        model, _ = utils.load_model(Path(job["model"]))
        if job.get("adapter"):
            model = utils.load_adapters(model, job["adapter"])
    model.eval()
    found = {}
    for what in ("logits", "wide"):
        for number, prompt in enumerate(job["prompts"]):
            logits = model(mx.array([prompt]))[0].astype(mx.float32)
            found[f"{what}:{number}"] = np.array(logits)
        model.set_dtype(mx.float32)
    return {**found, **values(model)}


if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        try:
            np.savez(each["answer"], **answered(each))
        except Exception as error:
            if not each.get("may_fail"):
                raise
            lines = str(error).splitlines() or [type(error).__name__]
            np.savez(each["answer"], error=np.array(lines[0][:200]))
