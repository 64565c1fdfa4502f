"""Relative residuals on MiniLM, rank 16, blocks of 64: what the settings are worth.

The published algorithm is ``--preset paper``: absmax scales, full SVD, last iterate; its uniform
method is the reference code's block-wise one. "geometric mean" is the change of the geometric mean
over the matrices. ``bits`` are stored bits per weight, scales and zero
points counted, without and with the adapter.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.tools import convert, minilm, table

_RANK = 16
# Each method's widths, and what it is compared with of those published.
_METHODS = (
    ("nf", (2, 3, 4), "nf"),
    ("fitted", (2, 3, 4), "nf"),
    ("trellis", (2,), "nf"),
    ("uniform", (2, 3, 4), "uniform-block"),
)


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "out"
        for bits in (2, 3, 4):
            for method, widths, published in _METHODS:
                if bits in widths:
                    rows.append(_row(output, bits, method, published))
    table(
        (
            "bits",
            "method",
            "paper, no adapter",
            "paper T=1",
            "paper T=5",
            "no adapter",
            "T=1",
            "T=5",
            "T=5 vs paper",
            "geometric mean",
            "svd-first T=5",
            "stored bits",
            "with adapter",
            "peak memory",
        ),
        rows,
    )

    print("\nScales as layout loftq can store them, T=5:\n")
    storages: list[list[str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for bits in (2, 3, 4):
            for method, widths, _ in _METHODS:
                if bits in widths:
                    line = _stored(Path(scratch) / "out", bits, method)
                    storages.append([str(bits), method, *line])
    columns = (f"{dtype} {what}" for dtype in _SCALE_DTYPES for what in ("bits", "residual"))
    table(("bits", "method", *columns), storages)


_SCALE_DTYPES = ("float32", "bfloat16", "int8")


def _stored(output: Path, bits: int, method: str) -> Iterator[str]:
    for dtype in _SCALE_DTYPES:
        options = ("--bits", str(bits), "--method", method, "--scale-dtype", dtype)
        totals = convert(minilm(), output, "--rank", str(_RANK), "--layout", "loftq", *options)
        yield f"{totals['totals']['bits_per_weight']:.3f}"
        yield f"{totals['totals']['relative_residual']:.4f}"


def _row(output: Path, bits: int, method: str, published: str) -> list[str]:
    model = minilm()
    common = ("--bits", str(bits), "--rank", str(_RANK), "--layout", "loftq")
    reference = (*common, "--preset", "paper", "--method", published)
    published_runs = [convert(model, output, *reference, "--iters", steps) for steps in ("1", "5")]
    paper = [run["totals"] for run in published_runs]
    ours = [
        convert(model, output, *common, "--method", method, "--iters", steps)
        for steps in ("1", "5")
    ]
    first = convert(
        model, output, *common, "--method", method, "--iters", "5", "--order", "svd-first"
    )
    totals = ours[1]["totals"]
    elements = sum(entry["shape"][0] * entry["shape"][1] for entry in ours[1]["matrices"])
    with_adapter = totals["bits_per_weight"] + totals["adapter_bytes"] * 8 / elements
    change = totals["relative_residual"] / paper[1]["relative_residual"] - 1
    mean_change = _geometric_mean(ours[1]) / _geometric_mean(published_runs[1]) - 1
    return [
        str(bits),
        method,
        f"{paper[0]['relative_residual_quantized']:.4f}",
        f"{paper[0]['relative_residual']:.4f}",
        f"{paper[1]['relative_residual']:.4f}",
        f"{totals['relative_residual_quantized']:.4f}",
        f"{ours[0]['totals']['relative_residual']:.4f}",
        f"{totals['relative_residual']:.4f}",
        f"{change:+.1%}",
        f"{mean_change:+.1%}",
        f"{first['totals']['relative_residual']:.4f}",
        f"{totals['bits_per_weight']:.3f}",
        f"{with_adapter:.3f}",
        f"{ours[1]['environment']['peak_host_bytes'] / 1e6:.0f} MB",
    ]


def _geometric_mean(manifest: dict[str, Any]) -> float:
    """Of the matrices' relative residuals."""
    norms = [entry["frobenius"] for entry in manifest["matrices"]]
    return statistics.geometric_mean(norm["final"] / norm["weight"] for norm in norms)
