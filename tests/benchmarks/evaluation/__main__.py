"""``python -m tests.benchmarks.evaluation``: train from every start, print one table.

Finished runs are kept in the work directory; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.benchmarks.evaluation import sentences, starts
from tests.benchmarks.tools import minilm, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="every start, three seeds")
    parser.add_argument("--steps", type=int, help="training steps (60; 100 with --full)")
    parser.add_argument("--model", type=Path, help="a checkpoint directory (MiniLM)")
    parser.add_argument("--data", type=Path, help="lines of label<TAB>text (movie reviews)")
    parser.add_argument("--only", default="", help="starts whose name contains this")
    parser.add_argument("--work", type=Path, default=Path("build/evaluation"))
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    data = given.data or given.work / "movie-reviews.tsv"
    if given.data is None and not data.is_file():
        sentences.movie_reviews(data)
    text = given.work / "training.txt"
    training = (sentence.text for sentence in sentences.read(data) if sentence.split == "train")
    text.write_text("\n".join(training) + "\n", "utf-8")
    steps = given.steps or (100 if given.full else 60)
    seeds = (0, 1, 2) if given.full else (0, 1)
    chosen = [
        start for start in starts.STARTS if (given.full or start.small) and given.only in start.name
    ]
    runs = _Runs(given.model or minilm(), data, given.work, steps)
    starts.measure(runs.model, text, runs.work)
    facts = [starts.prepare(start, runs.model, runs.work) for start in chosen]
    tried = runs.all([(start, rate, seeds[0]) for start in chosen for rate in start.rates])
    rates = {}
    for result in sorted(tried, key=lambda result: result["validation"]):
        rates[result["start"]] = result["rate"]
    results = runs.all([(start, rates[start.name], seed) for start in chosen for seed in seeds])
    rows = [
        _row(start, fact, [result for result in results if result["start"] == start.name])
        for start, fact in zip(chosen, facts, strict=True)
    ]
    found = sentences.read(data)
    tested = sum(sentence.split == "test" for sentence in found)
    print(f"{len(found)} sentences, {tested} of them for the test; {steps} steps of 32\n")
    curve = "training loss, by fifths"
    table(
        ("start", "residual", "bits", "rate", "accuracy", "sd", "each seed", curve, "memory"),
        rows,
    )


class _Runs:
    """Training runs, kept as files. Each is a process with one thread, as many at a time as there
    are cores: small models gain little from a second thread."""

    def __init__(self, model: Path, data: Path, work: Path, steps: int) -> None:
        self.model, self.work = model, work
        self._data, self._steps = data, steps

    def all(self, jobs: list[tuple[starts.Start, float, int]]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(lambda job: self._run(*job), jobs))

    def _run(self, start: starts.Start, rate: float, seed: int) -> dict[str, Any]:
        target = self.work / "runs" / f"{start.slug}-{rate:g}-{seed}-{self._steps}.json"
        target.parent.mkdir(exist_ok=True)
        if not target.is_file():
            job = {
                "start": start.name,
                "rate": rate,
                "seed": seed,
                "steps": self._steps,
                "model": str(self.model),
                "work": str(self.work),
                "data": str(self._data),
            }
            module = "tests.benchmarks.evaluation.training"
            command = [sys.executable, "-m", module, json.dumps(job), str(target)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            subprocess.run(command, check=True, env=environment, **quiet)
        result: dict[str, Any] = json.loads(target.read_text())
        progress = f"{start.name}, rate {rate:g}, seed {seed}: {result['test']:.1%}"
        print(progress, file=sys.stderr, flush=True)
        return result


def _row(start: starts.Start, facts: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
    accuracies = [100 * result["test"] for result in results]
    curves = zip(*(result["curve"] for result in results), strict=True)
    memory = statistics.median(result["training_bytes"] for result in results)
    return [
        start.name,
        f"{facts['relative_residual']:.3f}",
        f"{facts['bits_per_weight']:.2f}",
        f"{results[0]['rate']:g}",
        f"{statistics.mean(accuracies):.1f} %",
        f"{statistics.stdev(accuracies):.1f}",
        " ".join(f"{accuracy:.1f}" for accuracy in accuracies),
        " ".join(f"{statistics.mean(points):.3f}" for points in curves),
        f"{memory / 1e6:.0f} MB",
    ]


main()
