"""A conversion that accidents happen to: long enough to be met in the middle."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loftq_cli
from loftq_cli.checkpoint.output import open_output, verify
from tests.support import checkpoints
from tests.whole.crash import processes

SETTINGS: dict[str, Any] = {
    "bits": 2,
    "rank": 4,
    "iters": 4,
    "threads": 1,
    "svd": "exact",
    "layout": "loftq",
}
OPTIONS = ["--bits", "2", "--rank", "4", "--iters", "4", "-t", "1", "--svd", "exact"]
OPTIONS += ["--layout", "loftq"]


@dataclass(frozen=True)
class Conversion:
    """A conversion of fourteen matrices: its source, what comes of it, and how many seconds its
    work takes, from the first file to the last."""

    model: Path
    expected: dict[str, object]
    seconds: float

    def arguments(self, output: Path) -> list[str | Path]:
        return ["convert", self.model, "-o", output, *OPTIONS]

    def finish(self, output: Path) -> None:
        """Whatever is there is whole; what is left is done, and ends as ever."""
        if output.exists():
            verify(open_output(output))
        loftq_cli.convert(self.model, output, **SETTINGS)
        assert checkpoints.comparable(output) == self.expected
        assert [path.name for path in output.parent.iterdir()] == ["out"]
        shutil.rmtree(output.parent)


def wait_for_work(running: processes.Running, partial: Path) -> float:
    """Wait until ``running`` has begun to write (or is over); when it was."""
    while not running.is_over and not (partial / "journal").exists():
        time.sleep(0.0005)
    return time.monotonic()


def undisturbed(directory: Path) -> Conversion:
    """It runs twice in ``directory``, in peace."""
    tensors = checkpoints.llama(128, 128, layers=2)
    model = checkpoints.write(directory / "model", tensors, cuts=(6, 13))
    (model / "tokenizer.json").write_text("{}")
    loftq_cli.convert(model, directory / "expected", **SETTINGS)
    expected = checkpoints.comparable(directory / "expected")
    work = directory / "work"
    work.mkdir()
    seconds = []
    for _ in range(2):
        arguments = Conversion(model, expected, 0).arguments(work / "out")
        running = processes.Running(arguments, directory)
        started = wait_for_work(running, work / ".out.loftq-partial")
        assert running.end().code == 0
        seconds.append(time.monotonic() - started)
        shutil.rmtree(work / "out")
    return Conversion(model, expected, min(seconds))
