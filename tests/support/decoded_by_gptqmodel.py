"""What gptqmodel itself decodes stored tensors to, as the reference of a test."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from tests.support.quantizing import gaussian

Parts = dict[str, torch.Tensor]


def gptq(parts: Parts, bits: int, form: str) -> torch.Tensor:
    """``parts`` qweight, qzeros, scales and g_idx of a layer, decoded: float16 (out, in). Zero
    points are stored less one if ``form`` is gptq, as they are if it is gptq_v2."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, while importing
        qlinear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
        from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
    groups, rows = parts["scales"].shape
    columns = len(parts["g_idx"])
    layer: Any = qlinear.TorchLinear(
        bits=bits,
        group_size=columns // groups,
        sym=False,
        desc_act=True,
        in_features=columns,
        out_features=rows,
        bias=False,
        pack_dtype=torch.int32,
        register_buffers=True,
    )
    for key, value in parts.items():
        getattr(layer, key).copy_(value)
    if form == "gptq":
        convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    decoded: torch.Tensor = layer.dequantize_weight().T.half().clone()
    return decoded


def awq() -> tuple[Parts, torch.Tensor]:
    """Parts of a layer of 64 × 128 in groups of 64, 4 bits, drawn, and what they are decoded to:
    float16 (out, in)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, while importing
        packing = pytest.importorskip("gptqmodel.quantization.awq.utils.packing_utils")
    generator = torch.Generator().manual_seed(0)
    parts = {
        "qweight": torch.randint(-(2**31), 2**31 - 1, (128, 8), generator=generator).int(),
        "qzeros": torch.randint(-(2**31), 2**31 - 1, (2, 8), generator=generator).int(),
        "scales": gaussian(2, 64, seed=1).half(),
    }
    decoded = packing.dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], 4, 64)
    return parts, decoded.T
