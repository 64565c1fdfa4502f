"""Launches and waits a matrix on a CUDA device, counted on the stand-in of the tests.

They are what a GPU takes beside its arithmetic, and hardly depend on the matrix's size, but for
feedback, whose launches go with the columns."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

import loftq_cli
from loftq_cli.numerics import fused_panel
from tests.benchmarks.tools import table
from tests.support.stand_in.runtime import stand_in_devices
from tests.support.synthetic import llm_like

_METHODS = (("nf", 2), ("nf", 4), ("fitted", 2), ("uniform", 2), ("uniform-symmetric", 4))
_COLUMNS = 256


class _Kernels:
    """In the place of the Triton kernel, which the stand-in cannot run: as many launches."""

    LARGEST = 4

    @staticmethod
    def quantize_panel(
        targets: torch.Tensor, added: torch.Tensor, *others: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.empty(targets.shape, dtype=torch.uint8, device=targets.device)
        return codes, targets + added  # and the kernel, which is one more: see main


def main() -> None:
    moments = torch.eye(_COLUMNS) + 0.1
    rows = []
    for method, bits in _METHODS:
        plain, _ = _counted(method, bits, None)
        diagonal, _ = _counted(method, bits, moments.diagonal().clone())
        full, _ = _counted(method, bits, moments, feedback=False)
        by_columns, waits = _counted(method, bits, moments)
        with mock.patch.object(fused_panel, "_kernels", return_value=_Kernels):
            by_panels, _ = _counted(method, bits, moments)
        panels = -(-_COLUMNS // 64)
        columns = f"{(by_columns - full) / _COLUMNS:.1f}"
        fused = f"{(by_panels + panels - full) / _COLUMNS:.2f}"
        rows.append([f"{method}, {bits} bit", *map(str, (plain, diagonal, full)), columns, fused])
        rows[-1].append(str(waits))
    table(
        (
            *("method", "no statistics", "diagonal", "full, no feedback"),
            *("feedback, a column", "in Triton, a column", "waits, with feedback"),
        ),
        rows,
    )


def _counted(method: str, bits: int, moments: torch.Tensor | None, **more: Any) -> tuple[int, int]:
    """(launches, waits) of a matrix at T = 5."""
    weight = llm_like(64, _COLUMNS)
    settings: dict[str, Any] = {"method": method, "bits": bits, "rank": 16, "iters": 5, **more}
    with stand_in_devices(bfloat16=True) as tally:
        loftq_cli.decompose(weight.cuda(), moments=moments, **settings)
        return sum(tally.launches.values()), sum(tally.waits.values())
