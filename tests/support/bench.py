"""Conversions that are watched, or stopped at a chosen tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loftq_cli.checkpoint.request import Request
from loftq_cli.conversion.prepare import prepare
from loftq_cli.conversion.run import Outcome, run
from loftq_cli.machine.observer import Observer
from loftq_cli.settings.options import Options
from tests.support import checkpoints

MANIFEST = "loftq_manifest.json"
FIRST_SHARD = "model-00001-of-00002.safetensors"
SECOND_SHARD = "model-00002-of-00002.safetensors"
KEY = "model.layers.0.self_attn.k_proj.weight"
OUT = "model.layers.0.self_attn.o_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"  # the first matrix of the second shard


class Recorder(Observer):
    """Keeps the remarks, and can stop the conversion, as Ctrl-C would, before one tensor."""

    def __init__(self, stop_before: str | None = None) -> None:
        self.stop_before = stop_before
        self.notes: list[str] = []
        self.details: list[str] = []

    def working_on(self, name: str) -> None:
        if name == self.stop_before:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)

    def detail(self, text: str) -> None:
        self.details.append(text)

    def named(self, word: str) -> set[str]:
        """The tensors of which a detail says ``word``."""
        return {text.split(":")[0] for text in self.details if word in text}


class Bench:
    """A source, an output beside it, and conversions of the one into the other."""

    def __init__(self, directory: Path) -> None:
        self.source = directory / "model"
        self.output = directory / "out"
        self.partial = directory / ".out.loftq-partial"
        self.directory = directory

    def write(self, tensors: checkpoints.Tensors, cuts: tuple[int, ...] = ()) -> None:
        """Make the source."""
        checkpoints.write(self.source, tensors, cuts=cuts)

    def convert(
        self,
        recorder: Recorder | None = None,
        *,
        output: Path | None = None,
        overwrite: bool = False,
        **settings: Any,
    ) -> Outcome:
        """One conversion, with quick settings."""
        recorder = recorder or Recorder()
        options = Options(**{"threads": 1, "rank": 4, "iters": 2, **settings})
        target = output or self.output
        plan, path = prepare(
            Request(str(self.source)), target, options, overwrite=overwrite, observer=recorder
        )
        return run(plan, path, overwrite=overwrite, observer=recorder)

    def interrupt(self, stop_before: str, **settings: Any) -> None:
        """A conversion that is stopped."""
        with pytest.raises(KeyboardInterrupt):
            self.convert(Recorder(stop_before), **settings)

    def names(self) -> set[str]:
        """What lies in the directory."""
        return {path.name for path in self.directory.iterdir()}


def times(directory: Path) -> dict[str, int]:
    """When each file and directory was last changed."""
    paths = [directory, *directory.rglob("*")]
    return {str(path): path.stat().st_mtime_ns for path in paths}
