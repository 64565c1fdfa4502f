"""Decoding a packed matrix on the CPU: ours at every width, bitsandbytes' NF4, and a plain copy."""

from __future__ import annotations

import functools

import torch
from bitsandbytes import functional

from loftq_cli.checkpoint.packing import packed_length
from loftq_cli.numerics.quantizers.decoding import decode
from loftq_cli.numerics.quantizers.packed import Packed
from tests.benchmarks.tools import seconds, table

_SIDES = (1024, 2048, 4096)
_DTYPES = (torch.float32, torch.bfloat16)
_RUNS = 31


def main() -> None:
    rows = []
    for side in _SIDES:
        for dtype in _DTYPES:
            dense = torch.randn(side, side).to(dtype)
            stored = functional.quantize_4bit(dense, blocksize=64, quant_type="nf4")
            theirs = seconds(functools.partial(functional.dequantize_4bit, *stored), _RUNS)
            copy = seconds(dense.clone, _RUNS)
            for bits in (2, 3, 4, 8):
                codebook, affine = (_ours(side, bits, dtype, zeros) for zeros in (False, True))
                shown = (codebook, affine, theirs, copy)
                name = str(dtype).removeprefix("torch.")
                times = [f"{time * 1e3:.2f} ms" for time in shown]
                rows.append([f"{side}²", name, str(bits), *times])
    columns = ("codebook", "zero points", "bitsandbytes NF4", "copy")
    table(("shape", "dtype", "bits", *columns), rows)
    print(f"\n{torch.get_num_threads()} threads")


def _ours(side: int, bits: int, dtype: torch.dtype, zeros: bool) -> float:
    scales = torch.rand(side * side // 64)
    weight = _random_bytes(side * side, bits)
    parameters = (
        (scales, _random_bytes(scales.numel(), bits), None)
        if zeros
        else (scales, None, torch.randn(2**bits))
    )
    packed = Packed((side, side), bits, 64, weight, *parameters)
    return seconds(lambda: decode(packed, dtype), _RUNS)


def _random_bytes(count: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 256, (packed_length(count, bits),), dtype=torch.uint8)
