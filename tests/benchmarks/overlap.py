"""A whole model: wall time against pure reading, writing and computing, and how it grows.

Llama-2-7b's shapes in bfloat16, random values, 2 bits, rank 64, T = 5; one, two and four layers.
"reading and writing" reads and hashes the source and writes and hashes as many bytes as the output
has, and nothing else; "computing" decomposes the same matrices, already in memory.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import loftq_cli
from loftq_cli.checkpoint.header import TensorSpec, read_header
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.checkpoint.writer import GrowingShard
from tests.benchmarks.memory import write_model
from tests.benchmarks.tools import convert, table

_SETTINGS: dict[str, Any] = {"bits": 2, "rank": 64, "iters": 5}
_LAYERS = (1, 2, 4)


def main() -> None:
    rows = []
    each = []
    for layers in _LAYERS:
        with tempfile.TemporaryDirectory() as scratch:
            model, output = Path(scratch) / "model", Path(scratch) / "out"
            size = write_model(model, layers)
            options = [f"--{name}={value}" for name, value in _SETTINGS.items()]
            manifest = convert(model, output, *options)
            wall = manifest["environment"]["seconds"]
            compute = _compute(model)
            written = sum(entry["size"] for entry in manifest["outputs"])
            moving = _move(model, Path(scratch) / "copy", written)
            each.append(wall / layers)
            rows.append(
                [
                    str(layers),
                    f"{size / 1e9:.2f} GB",
                    f"{moving:.1f} s",
                    f"{compute:.1f} s",
                    f"{wall:.1f} s",
                    f"{wall / max(moving, compute):.2f}",
                    f"{wall / layers:.2f} s",
                ]
            )
    table(
        (
            "layers",
            "checkpoint",
            "reading and writing",
            "computing",
            "wall",
            "wall / the larger",
            "per layer",
        ),
        rows,
    )
    spread = max(each) / statistics.median(each) - 1
    print(f"\nper layer: {min(each):.2f} to {max(each):.2f} s, {spread:+.1%} about the median")


def _compute(model: Path) -> float:
    total = 0.0
    for path in sorted(model.glob("*.safetensors")):
        with TensorFile(path) as file:
            for tensor in read_header(path).tensors:
                weight = file.read(tensor).float()
                started = time.perf_counter()
                loftq_cli.decompose(weight, method="uniform", **_SETTINGS)
                total += time.perf_counter() - started
    return total


def _move(model: Path, copy: Path, written: int) -> float:
    started = time.perf_counter()
    copy.mkdir()
    with GrowingShard(copy / "out", [TensorSpec("bytes", "U8", (written,))]) as out:
        writer = out.tensor("bytes")
        for path in sorted(model.glob("*.safetensors")):
            digest = hashlib.sha256()
            with TensorFile(path) as file:
                for tensor in read_header(path).tensors:
                    for piece in file.pieces(tensor):
                        digest.update(piece)
        piece = bytearray(16 << 20)
        for start in range(0, written, len(piece)):
            writer.append(memoryview(piece)[: min(len(piece), written - start)])
        out.sync()
    return time.perf_counter() - started
