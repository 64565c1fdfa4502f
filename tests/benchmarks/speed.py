"""``decompose`` against PEFT 0.10.0's loftq_init, T = 5, on LLM-like synthetic matrices.

PEFT runs once per shape (minutes each), ours is the median of five. PEFT has no 3 bits: the
reference for NF3 is ``preset="paper"``, which computes the same. The floor is (10 + 4 T) thin
products of the matrix with r columns in float32 and 2 (T + 1) copies of it, at the speed measured
in the same run. The second table is of fresh processes: their first and their second call.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from typing import Any

import torch

import loftq_cli
from tests.benchmarks import reference
from tests.benchmarks.tools import seconds, table
from tests.support.synthetic import llm_like

_ITERS = 5
_CASES = (
    # rows, columns, bits, rank
    (1024, 1024, 2, 64),
    (4096, 4096, 2, 64),
    (4096, 4096, 2, 16),
    (4096, 4096, 3, 64),
    (4096, 4096, 4, 64),
    (4096, 4096, 4, 16),
    (4096, 11008, 2, 64),
    (11008, 4096, 2, 64),
)


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {_load()}\n")
    rows = []
    for out_features, in_features, bits, rank in _CASES:
        weight = llm_like(out_features, in_features)
        settings: dict[str, Any] = {"bits": bits, "method": "nf", "rank": rank, "iters": _ITERS}
        result = loftq_cli.decompose(weight, **settings)
        ours = seconds(partial(loftq_cli.decompose, weight, **settings))
        residual = result.final / result.weight_norm
        started = time.perf_counter()
        if bits == 3:
            paper = loftq_cli.decompose(weight, preset="paper", bits=3, rank=rank, iters=_ITERS)
            theirs_residual = paper.final / paper.weight_norm
        else:
            theirs_residual = reference.loftq_init(weight, bits, rank, _ITERS)
        theirs = time.perf_counter() - started
        floor = _floor(weight, rank)
        rows.append(
            [
                f"{out_features} x {in_features}",
                f"NF{bits}",
                str(rank),
                f"{theirs:.1f} s",
                f"{ours:.3f} s",
                f"{theirs / ours:.0f}x",
                f"{theirs_residual:.4f}",
                f"{residual:.4f}",
                f"{residual / theirs_residual - 1:+.1%}",
                f"{ours / floor:.2f}",
            ]
        )
    table(
        (
            "shape",
            "bits",
            "rank",
            "PEFT",
            "loftq",
            "faster",
            "PEFT residual",
            "residual",
            "change",
            "time / floor",
        ),
        rows,
    )

    print("\n4096 x 4096, NF2, rank 64:\n")
    _fresh_processes()


_FRESH = """
import json, time, torch, loftq_cli
from tests.support.synthetic import llm_like
weight, times = llm_like(4096, 4096), []
for _ in range(3):
    started = time.perf_counter()
    loftq_cli.decompose(weight, bits=2, method="nf", rank=64)
    times.append(time.perf_counter() - started)
print(json.dumps(times))
"""


def _fresh_processes() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for name, changed in (
            ("tensor operations", {"LOFTQ_NATIVE": "0"}),
            ("compiled, empty cache", {"XDG_CACHE_HOME": cache}),
            ("compiled, cached", {"XDG_CACHE_HOME": cache}),
        ):
            result = subprocess.run(
                [sys.executable, "-c", _FRESH],
                env={**os.environ, **changed},
                check=True,
                capture_output=True,
            )
            first, *others = json.loads(result.stdout)
            rows.append([name, f"{first:.2f} s", f"{min(others):.2f} s"])
    table(("variant", "first call", "later"), rows)


def _floor(weight: torch.Tensor, rank: int) -> float:
    thin = torch.randn(weight.shape[1], rank)
    target = torch.empty_like(weight)
    product = seconds(lambda: weight @ thin)
    copy = seconds(lambda: target.copy_(weight))
    return (10 + 4 * _ITERS) * product + 2 * (_ITERS + 1) * copy


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}"
