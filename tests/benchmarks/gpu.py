"""A CUDA device: ours against a full SVD of every residual on it, and Llama-2-7b's matrices.

Without one it says so and measures nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import loftq_cli
from tests.benchmarks.tools import table
from tests.support.synthetic import llm_like

_SETTINGS: dict[str, Any] = {"bits": 2, "method": "nf", "rank": 64, "iters": 5}
# Shape, and how many of it Llama-2-7b has: 4 + 2 + 1 in each of 32 layers.
_SHAPES = (((4096, 4096), 128), ((11008, 4096), 64), ((4096, 11008), 32))
_RUNS = 5


def _half_product(weight: torch.Tensor, thin: torch.Tensor) -> torch.Tensor:
    return weight.bfloat16() @ thin.bfloat16()


def main() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device here: not measured")
        return
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}\n")
    measure(device, _SHAPES)


def measure(device: torch.device, shapes: tuple[tuple[tuple[int, int], int], ...]) -> None:
    """Print the table for ``shapes``, ((out, in), how many)."""
    rows = []
    total = 0.0
    for shape, count in shapes:
        weight = llm_like(*shape).to(device)
        ours = _seconds(partial(loftq_cli.decompose, weight, **_SETTINGS), device)
        exact = _seconds(partial(loftq_cli.decompose, weight, svd="exact", **_SETTINGS), device)
        copy = _seconds(weight.clone, device)
        thin = torch.randn(shape[1], 96, device=device)
        product = _seconds(partial(_half_product, weight, thin), device)
        total += count * ours
        passes = 2 * (_SETTINGS["iters"] + 1)
        rows.append(
            [
                f"{shape[0]} x {shape[1]}",
                str(count),
                f"{exact * 1e3:.1f} ms",
                f"{ours * 1e3:.1f} ms",
                f"{exact / ours:.0f}x",
                f"{passes * copy / ours:.0%}",
                f"{31 * product / ours:.0%}",
            ]
        )
    table(
        ("shape", "matrices", "full SVD", "loftq", "faster", "copies", "products"),
        rows,
    )
    print(f"\nall {sum(count for _, count in shapes)} matrices: {total:.1f} s")
    print('"copies": the share that reading and writing the weights 2 (T + 1) times would take;')
    print('"products": that of the 31 thin products in bfloat16.')


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_RUNS + 1):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
