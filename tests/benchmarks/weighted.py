"""What statistics cost: ``decompose`` without them, with diagonal and with full moments, in turn.

4096², NF2 and uniform, r = 64, T = 5, moments that fall as 1/k. Times are the least of all rounds,
on as many threads as torch takes and on one, there also of the processor alone: what others do on
the same cores is not in that.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import loftq_cli
from tests.benchmarks.tools import table
from tests.support.quantizing import gaussian
from tests.support.synthetic import llm_like

_SIDE = 4096
_ROUNDS = 4
_KINDS: tuple[tuple[str, str | None, bool], ...] = (
    ("none", None, False),
    ("diagonal", "diagonal", False),
    ("full, no feedback", "full", False),
    ("full", "full", True),
)


def main() -> None:
    threads = torch.get_num_threads()
    weight, moments = llm_like(_SIDE, _SIDE), falling(_SIDE)
    rows = []
    for method in ("nf", "uniform"):
        settings: dict[str, Any] = {"bits": 2, "method": method, "rank": 64, "iters": 5}
        for count in sorted({1, threads}, reverse=True):
            torch.set_num_threads(count)
            rows += _measured(weight, moments, settings, count)
    torch.set_num_threads(threads)
    table(("method", "threads", "statistics", "wall", "ratio", "processor", "ratio"), rows)


def falling(side: int) -> torch.Tensor:
    """Moments float32 (side, side) whose eigenvalues fall as 1/k."""
    axes = torch.linalg.qr(gaussian(side, side, seed=1)).Q
    return (axes / torch.arange(1, side + 1)) @ axes.T


def _measured(
    weight: torch.Tensor, moments: torch.Tensor, settings: dict[str, Any], threads: int
) -> list[list[str]]:
    least = {name: [float("inf")] * 2 for name, _, _ in _KINDS}
    given = {None: None, "diagonal": moments.diagonal().clone(), "full": moments}
    for turn in range(_ROUNDS + 1):  # the first is not counted
        for name, kind, feedback in _KINDS:
            begun = time.perf_counter(), time.thread_time()
            loftq_cli.decompose(weight, moments=given[kind], feedback=feedback, **settings)
            taken = time.perf_counter() - begun[0], time.thread_time() - begun[1]
            if turn:
                least[name] = [min(pair) for pair in zip(least[name], taken, strict=True)]
    wall, processor = least["none"]
    return [
        [
            str(settings["method"]),
            str(threads),
            name,
            f"{taken[0]:.3f} s",
            f"{taken[0] / wall:.2f}",
            f"{taken[1]:.3f} s" if threads == 1 else "",
            f"{taken[1] / processor:.2f}" if threads == 1 else "",
        ]
        for name, taken in least.items()
    ]
