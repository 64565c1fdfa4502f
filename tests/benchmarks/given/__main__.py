"""``python -m tests.benchmarks.given``: perplexity of SmolLM2 on quantized backbones as other
libraries make them, with a zero adapter, EoRA's and ours, before and after a little training.

Finished results are kept in the work directory; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.given import adapters, backbones
from tests.benchmarks.language import model, statistics, text
from tests.benchmarks.language.measure import distance, log_probabilities
from tests.benchmarks.language.training import train
from tests.benchmarks.tools import Results, refine, table

RANK = 64
RATE = 2e-4
STEPS = 44
KINDS = ("zero", "EoRA", "plain", "full", "refined")
REFINED = ("--end-to-end", "32", "--samples", "144", "--length", "512")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/given"))
    parser.add_argument("--model", type=Path, help="the model, if it is prepared already")
    parser.add_argument("--stats", type=Path, help="its full statistics, likewise")
    parser.add_argument("--calibration", type=Path, help="the text that those are of")
    parser.add_argument("--only", default=",".join(backbones.BACKBONES))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--trained", default=",".join(KINDS), help="kinds to train")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    runs = _Runs(given.work, given.model, given.stats, given.calibration)
    rows = []
    for name in given.only.split(","):
        for kind in given.kinds.split(","):
            before = runs.before(name, kind)
            after = runs.after(name, kind) if kind in given.trained.split(",") else None
            rows.append(_row(name, kind, before, after))
    table(("backbone", "adapter", "perplexity", "KL", "top-1", "after training"), rows)


class _Runs:
    """What was found about each adapter, kept as files."""

    def __init__(
        self, work: Path, prepared: Path | None, stats: Path | None, calibration: Path | None
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._work = work
        self._model = prepared or model.prepare(work / "model")
        text.write_parts(work)
        self._calibration = calibration or work / "calibration.txt"
        self._stats = stats or statistics.prepare("full-32768", self._model, work)
        self._tokenizer = AutoTokenizer.from_pretrained(self._model)
        self._training = text.windows(self._tokenizer, work / "training.txt")
        found = text.windows(self._tokenizer, work / "evaluation.txt")
        self._evaluation = found[:: len(found) // text.EVALUATED][: text.EVALUATED]
        self._original = AutoModelForCausalLM.from_pretrained(self._model).eval()
        self._reference = [log_probabilities(self._original, w) for w in self._evaluation]
        self._results = Results(work)
        self._results.of("original", lambda: self._measured(self._original))

    def before(self, name: str, kind: str) -> dict[str, Any]:
        """Of the adapter itself."""

        def find() -> dict[str, Any]:
            started = time.monotonic()
            loaded = self._loaded(name, kind).eval()
            made = time.monotonic() - started
            return {**self._measured(loaded), "seconds": made}

        return self._results.of(f"{name}-{kind}", find)

    def after(self, name: str, kind: str) -> dict[str, Any]:
        """Of what training makes of it."""

        def find() -> dict[str, Any]:
            loaded = self._loaded(name, kind)
            losses = train(loaded, self._training, STEPS, RATE)
            return {**self._measured(loaded), "losses": losses}

        return self._results.of(f"{name}-{kind}-{RATE:g}-{STEPS}", find)

    def _measured(self, loaded: Any) -> dict[str, Any]:
        return asdict(distance(loaded, self._reference, self._evaluation))

    def _loaded(self, name: str, kind: str) -> Any:
        adapted = self._adapted(name, "full" if kind in ("zero", "EoRA") else kind)
        held = adapters.values(adapted)
        if kind == "zero":
            pairs = None
        elif kind == "EoRA":
            weights = {each: self._original.get_submodule(each).weight.detach() for each in held}
            pairs = adapters.eora(weights, held, statistics.moments(self._stats), RANK)
        else:
            pairs = adapters.pairs(adapted)
        return adapters.model(self._model, held, pairs, RANK)

    def _adapted(self, name: str, kind: str) -> Path:
        """The backbone with our adapter, by the command line."""
        target = self._work / "adapted" / f"{name}-{kind}"
        if target.is_dir():
            return target
        if kind == "refined":
            refine(self._model, self._adapted(name, "full"), target, self._calibration, *REFINED)
            return target
        windows = text.windows(self._tokenizer, self._calibration)
        backbone = backbones.prepare(name, self._model, self._work, windows)
        command = [sys.executable, "-m", "loftq_cli", "adapt", str(backbone), "-o", str(target)]
        words = ["--source", str(self._model), "--rank", str(RANK), "--with-backbone", "-q"]
        stats = ["--stats", str(self._stats)] if kind == "full" else []
        subprocess.run([*command, *words, *stats], check=True, stdout=subprocess.DEVNULL)
        return target


def _row(name: str, kind: str, before: dict[str, Any], after: dict[str, Any] | None) -> list[str]:
    return [
        name,
        kind,
        f"{before['perplexity']:.4g}",
        f"{before['divergence']:.2f}",
        f"{before['agreement']:.1%}",
        f"{after['perplexity']:.4g}" if after else "-",
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
