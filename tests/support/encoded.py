"""Checkpoints that are quantized themselves, as publishers write them, with what they mean."""

from __future__ import annotations

import importlib
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes float8_e4m3 (out, in) and the scale float32 of each ``block``."""
    rows, columns = weight.shape
    grid = -(-rows // block[0]), -(-columns // block[1])
    padded = torch.zeros(grid[0] * block[0], grid[1] * block[1])
    padded[:rows, :columns] = weight.float()
    tiles = padded.view(grid[0], block[0], grid[1], block[1])
    scales = tiles.abs().amax(dim=(1, 3)).clamp_min(1e-12) / _LARGEST
    codes = (tiles / scales[:, None, :, None]).view(padded.shape)[:rows, :columns]
    return codes.to(torch.float8_e4m3fn).contiguous(), scales


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    return ".layers." in name and name.endswith(".weight") and tensor.dim() == 2


def fp8_blocks(tensors: Tensors, block: tuple[int, int] = (128, 128)) -> tuple[Tensors, Any]:
    """As DeepSeek-V3 and Qwen3 are published."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if is_linear(name, tensor):
            found[name], found[f"{name}_scale_inv"] = fp8(tensor, block)
        else:
            found[name] = tensor
    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
    }
    return found, config


def fp8_rows(tensors: Tensors, per_row: bool, dtype: torch.dtype) -> tuple[Tensors, Any]:
    """compressed-tensors, float-quantized: a scale a row, or a tensor, in ``dtype``."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if is_linear(name, tensor):
            block = (1, tensor.shape[1]) if per_row else (tensor.shape[0], tensor.shape[1])
            codes, scales = fp8(tensor, block)
            found[name] = codes
            found[f"{name}_scale"] = scales.to(dtype) if per_row else scales.to(dtype).view(1)
        else:
            found[name] = tensor
    weights = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "channel" if per_row else "tensor",
        "dynamic": False,
    }
    return found, _compressed("float-quantized", weights)


def _compressed(form: str, weights: dict[str, Any]) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def int4(tensors: Tensors, size: int, symmetric: bool) -> tuple[Tensors, Any]:
    """compressed-tensors, pack-quantized, compressed by that library itself (Kimi-K2)."""
    library = importlib.import_module("compressed_tensors.quantization")
    compressors = importlib.import_module("compressed_tensors.compressors")
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": size,
        "dynamic": False,
    }
    args = library.QuantizationArgs(**weights)
    scheme = library.QuantizationScheme(targets=["Linear"], weights=args)
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    found: Tensors = {}
    for name, tensor in tensors.items():
        if not is_linear(name, tensor):
            found[name] = tensor
            continue
        groups = tensor.float().view(tensor.shape[0], -1, size)
        if symmetric:
            scales, zeros = groups.abs().amax(dim=2) / 7, None
        else:
            low, high = groups.amin(dim=2), groups.amax(dim=2)
            scales = (high - low) / 15
            zeros = (-8 - low / scales).round().clamp(-8, 7).to(torch.int8)
        state = {"weight": tensor, "weight_scale": scales.to(tensor.dtype)}
        if zeros is not None:
            state["weight_zero_point"] = zeros
        parts = compressor.compress(state, scheme)
        found |= {f"{name.removesuffix('weight')}{key}": value for key, value in parts.items()}
    return found, _compressed("pack-quantized", weights)
