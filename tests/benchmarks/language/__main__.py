"""``python -m tests.benchmarks.language``: perplexity of a real language model from every start,
before and after a little training, as one table.

Finished results are kept in the work directory; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.benchmarks.language import brown, model, page, starts, statistics, text
from tests.benchmarks.language.measure import Originals, distance, log_probabilities
from tests.benchmarks.language.training import train
from tests.benchmarks.tools import Results, table

_COLUMNS = (
    "perplexity",
    "KL",
    "top-1",
    "Brown",
    "its KL",
    "plain residual",
    "weighted residual",
    "bits",
    "with adapter",
    "seconds",
    "GB",
    "after 44 steps",
    "rate",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="every start, and both learning rates")
    parser.add_argument("--steps", type=int, default=44, help="training steps (44); 0: none")
    parser.add_argument("--only", default="", help="starts that this regular expression is in")
    parser.add_argument("--write", action="store_true", help="into the tables of README and docs")
    parser.add_argument("--work", type=Path, default=Path("build/language"))
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    chosen = [
        start
        for start in starts.STARTS
        if (given.full or start.small) and re.search(given.only, start.name)
    ]
    runs = _Runs(given.work, given.steps)
    rates = starts.RATES if given.full else starts.RATES[1:]
    before, after = [], []
    for start in chosen:
        before.append(runs.before(start))
        if not start.trained:
            runs.discard(start)
    for start in chosen:
        trained = start.trained and given.steps
        after.append([runs.after(start, rate) for rate in rates] if trained else [])
        if trained:
            runs.discard(start)
    rows = {
        start.name: page.row(first, trained)
        for start, first, trained in zip(chosen, before, after, strict=True)
    }
    table(
        ("start", *_COLUMNS),
        [[name, *(row[heading] for heading in _COLUMNS)] for name, row in rows.items()],
    )
    if given.write:
        page.write(rows)


class _Runs:
    """What was found about each start, kept as files."""

    def __init__(self, work: Path, steps: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._work, self._steps, self._results = work, steps, Results(work)
        self._model = model.prepare(work / "model")
        text.write_parts(work)
        brown.write(work)
        tokenizer = AutoTokenizer.from_pretrained(self._model)
        self._training = text.windows(tokenizer, work / "training.txt")
        original = AutoModelForCausalLM.from_pretrained(self._model).eval()
        self._judged = {}
        for name, file in (("editorials", "evaluation"), ("brown", "brown-judgement")):
            windows = text.spread(text.windows(tokenizer, work / f"{file}.txt"))
            known = [log_probabilities(original, window) for window in windows]
            self._judged[name] = known, windows
        moments = statistics.moments(statistics.prepare("full-8192", self._model, work))
        weights = {name: original.get_submodule(name).weight.detach() for name in moments}
        self._originals = Originals(weights, moments)

    def before(self, start: starts.Start) -> dict[str, Any]:
        """Of the start itself."""

        def find() -> dict[str, Any]:
            result = starts.prepare(start, self._model, self._work)
            loaded = starts.load(start, self._model, self._work).eval()
            result |= self._distances(loaded)
            plain, weighted = self._originals.residuals(loaded.get_base_model())
            return {**result, "plain": plain, "weighted": weighted}

        return self._results.of(start.slug, find)

    def after(self, start: starts.Start, rate: float) -> dict[str, Any]:
        """Of what training makes of it."""

        def find() -> dict[str, Any]:
            if start.options is not None and not self._converted(start).is_dir():
                starts.prepare(start, self._model, self._work)
            loaded = starts.load(start, self._model, self._work)
            started = time.monotonic()
            losses = train(loaded, self._training, self._steps, rate)
            seconds = time.monotonic() - started
            told = {"rate": rate, "losses": losses, "seconds": seconds}
            return {**told, **self._distances(loaded)}

        return self._results.of(f"{start.slug}-{rate:g}-{self._steps}", find)

    def _distances(self, loaded: Any) -> dict[str, Any]:
        found = {name: asdict(distance(loaded, *held)) for name, held in self._judged.items()}
        return {**found.pop("editorials"), **found}

    def discard(self, start: starts.Start) -> None:
        """Remove its conversion."""
        shutil.rmtree(self._converted(start), ignore_errors=True)

    def _converted(self, start: starts.Start) -> Path:
        return self._work / "converted" / start.slug


if __name__ == "__main__":
    main()
