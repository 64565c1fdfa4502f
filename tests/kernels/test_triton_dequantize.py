"""The Triton kernel, in Triton's interpreter, against the decoder that the golden bytes hold."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loftq_cli.loading import packed_weight
from loftq_cli.loading.packed_weight import PackedFormat, PackedTensors
from loftq_cli.numerics.quantizers.packed import Packed

ROOT = Path(__file__).parents[2]

# The interpreter has to be chosen before triton is imported: a process of its own. It truncates to
# bfloat16, where a GPU rounds, so that dtype is left out.
CASES = """
import itertools, torch
from loftq_cli.kernels import triton_dequantize
from loftq_cli.numerics.quantizers import decoding, trellis_code
from loftq_cli.numerics.quantizers.packed import Packed
from loftq_cli.checkpoint.packing import packed_length

def random_bytes(count, bits):
    return torch.randint(0, 256, (packed_length(count, bits),), dtype=torch.uint8)

torch.manual_seed(0)
shapes = [(1, 1), (7, 45), (33, 70), (16, 96), (64, 64)]
for shape, bits, size in itertools.product(shapes, (2, 3, 4, 8), (32, 64, 0)):
    count = shape[0] * shape[1]
    weight = random_bytes(count, bits)
    codebook = (torch.randn(-(-count // size) if size else 1), None, torch.randn(2**bits))
    groups = shape[0] * -(-shape[1] // (size or 1))
    affine = (torch.randn(groups), random_bytes(groups, bits), None)
    for parameters in (codebook, affine)[: 2 if size else 1]:
        for dtype in (torch.float32, torch.float16):
            packed = Packed(shape, bits, size, weight, *parameters)
            actual = triton_dequantize.decode(packed, dtype)
            expected = decoding.decode(packed, dtype)
            assert torch.equal(actual, expected), (shape, bits, size, dtype)

for shape in [(1, 1), (7, 45), (24, 5), (256, 6), (300, 9), (270, 8)]:
    count = shape[0] * shape[1]
    scales, levels = torch.randn(-(-count // 32)), trellis_code.levels(torch.device("cpu"))
    packed = Packed(shape, 2, 32, random_bytes(count, 2), scales, None, levels)
    assert torch.equal(triton_dequantize.decode(packed), decoding.decode(packed)), shape
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
def test_the_kernel_decodes_the_same_bits() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    path = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    subprocess.run([sys.executable, "-c", CASES], env=environment, check=True)


@pytest.mark.parametrize(("on_cuda", "used"), [(True, True), (False, False)])
def test_it_is_used_on_cuda(monkeypatch, on_cuda, used) -> None:
    calls = []
    monkeypatch.setattr(packed_weight, "_triton_decode", lambda: lambda *call: calls.append(call))
    monkeypatch.setattr(packed_weight, "decode", lambda *call: None)
    weight: Any = SimpleNamespace(is_cuda=on_cuda)
    packing = PackedFormat(2, 64, "codebook")
    scales, levels = torch.ones(1), torch.ones(4)
    stored = PackedTensors(weight, scales, None, None, levels)
    packed_weight.dense((2, 4), packing, torch.bfloat16, stored)
    expected = (Packed((2, 4), 2, 64, weight, scales, None, levels), torch.bfloat16)
    assert calls == [expected] * used


def test_it_takes_scales_that_are_unpacked(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(packed_weight, "_triton_decode", lambda: lambda *call: calls.append(call))
    packing = PackedFormat(2, 64, "codebook", "int8")
    scales, steps = torch.tensor([127, -3], dtype=torch.int8), torch.tensor([0.5]).bfloat16()
    weight: Any = SimpleNamespace(is_cuda=True)
    stored = PackedTensors(weight, scales, steps, None, None)
    packed_weight.dense((2, 64), packing, torch.float32, stored)
    given = calls[0][0].scales
    assert (given.dtype, given.tolist()) == (torch.float32, [63.5, -1.5])


def test_without_triton_there_is_none(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "loftq_cli.kernels.triton_dequantize", raising=False)
    assert packed_weight._triton_decode.__wrapped__() is None
