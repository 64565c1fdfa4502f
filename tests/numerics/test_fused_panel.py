"""The Triton kernel of feedback's panels, in Triton's interpreter, against the tensor operations;
and which quantizers it is for."""

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

import loftq_cli
from loftq_cli.numerics import feedback, fused_panel
from tests.support.stand_in.runtime import stand_in_devices
from tests.support.synthetic import llm_like

ROOT = Path(__file__).parents[2]

# The interpreter has to be chosen before triton is imported: a process of its own. It truncates to
# bfloat16, where a GPU rounds, so that dtype is left out. A column has one error to make up for:
# sums of several differ in their order.
CASES = """
import torch
from loftq_cli.kernels.triton_feedback import quantize_panel
from loftq_cli.numerics.feedback import _quantize_panel
from loftq_cli.numerics.quantizers.methods import make_quantizer

torch.manual_seed(0)
methods = ("nf", 2), ("nf", 3), ("nf", 4), ("uniform", 2), ("uniform", 3), ("uniform", 8)
for method, bits in methods:
    quantizer = make_quantizer(method, bits, 64, "mse", False, native=False)
    affine = method == "uniform"
    table = None if affine else quantizer.table
    levels, boundaries = (None, None) if affine else (table.levels, table.boundaries)
    for columns, rows in ((64, 70), (5, 3)):
        for dtype in (None, torch.float16):
            factor = torch.eye(columns)
            for column in range(columns - 1):
                later = int(torch.randint(column + 1, columns, ()))
                factor[column, later] = float(torch.randn(()))
            scales = torch.rand(columns, rows) + 0.1
            scales[0, 0] = 0.0
            zeros = torch.randint(1, 2**bits, (columns, rows)).float() if affine else None
            targets, added = torch.randn(columns, rows), torch.randn(columns, rows)
            targets[-1, -1] = float("inf")
            given = targets, added, factor, scales, zeros
            found = quantize_panel(
                *given, levels=levels, boundaries=boundaries, bits=bits, dtype=dtype
            )
            expected = _quantize_panel(quantizer, *given, dtype)
            case = method, bits, columns, dtype
            assert found[0].float().mean() > 0 and len(found[0].unique()) > 2, case
            assert torch.equal(found[0], expected[0]), case
            assert torch.equal(found[1].nan_to_num(), expected[1].nan_to_num()), case
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
def test_the_kernel_quantizes_as_the_tensor_operations_do() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    path = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    subprocess.run([sys.executable, "-c", CASES], env=environment, check=True)


class Kernels(SimpleNamespace):
    """In the place of the module, where triton is not: the tensor operations, by what the kernel is
    given."""

    LARGEST = 4

    def __init__(self) -> None:
        super().__init__(panels=0)

    def quantize_panel(
        self, *given: Any, levels: Any, boundaries: Any, bits: int, dtype: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.panels += 1
        told: Any = _Told(levels, boundaries, bits)
        panel: Any = feedback._quantize_panel
        return panel(told, *given, dtype)


class _Told:
    """Encodes with what the kernel is told of a quantizer."""

    def __init__(self, levels: Any, boundaries: Any, bits: int) -> None:
        self.levels, self.boundaries, self.top = levels, boundaries, 2**bits - 1

    def encode_at(
        self, x: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        unit = x / torch.where(scales == 0, 1.0, scales)
        if zeros is None:
            codes = (unit[:, None] > self.boundaries).sum(dim=1)
            return codes.to(torch.uint8), self.levels[codes] * scales
        offsets = torch.maximum(torch.minimum(unit.round(), self.top - zeros), -zeros)
        return (offsets + zeros).to(torch.uint8), offsets * scales


@pytest.mark.parametrize(
    ("method", "bits", "panels"),
    [("nf", 2, 3), ("nf", 4, 3), ("uniform", 8, 3), ("fitted", 3, 3), ("nf", 8, 0)],
)
def test_it_is_used_for_these_quantizers(
    method: str, bits: int, panels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A panel is 64 columns, and what comes of it is the same."""
    settings: dict[str, Any] = {"bits": bits, "method": method, "rank": 4, "iters": 1}
    weight, moments = llm_like(32, 130), torch.eye(130) + 0.1
    with stand_in_devices():
        expected = loftq_cli.decompose(weight.cuda(), moments=moments, **settings)
        kernels = Kernels()
        monkeypatch.setattr(fused_panel, "_kernels", lambda: kernels)
        found = loftq_cli.decompose(weight.cuda(), moments=moments, **settings)
        assert torch.equal(found.quantized.codes, expected.quantized.codes)
        assert found.frobenius == expected.frobenius
    assert kernels.panels == panels


def test_without_triton_or_a_device_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "loftq_cli.kernels.triton_feedback", raising=False)
    assert fused_panel._kernels.__wrapped__() is None
    monkeypatch.setattr(fused_panel, "_kernels", Kernels)
    assert fused_panel.fused_panel(object(), torch.device("cpu")) is None  # type: ignore[arg-type]
