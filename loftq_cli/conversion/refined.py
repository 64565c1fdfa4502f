"""``convert --refine``: what is converted is refined at once, and its start kept beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.output import open_output
from loftq_cli.errors import UsageError
from loftq_cli.machine.observer import Observer
from loftq_cli.refinement.refine import refine
from loftq_cli.refinement.settings import Refining


def start_of(output: Path, texts: Sequence[Path]) -> Path:
    """Where the conversion lies that is refined to ``output``. Raises UsageError without texts."""
    if not texts:
        raise UsageError("--refine needs text", hint="name it with --calibrate-text")
    return output.with_name(f"{output.name}.start")


@dataclass(frozen=True)
class Start:
    """The conversion ``path``, which is to be refined to ``output`` on ``texts``."""

    path: Path
    output: Path
    texts: Sequence[Path]
    device: str

    def refine(
        self, model: str, *, offline: bool, overwrite: bool, observer: Observer
    ) -> dict[str, Any]:
        """Refine it against ``model``; the manifest. Raises what
        :func:`~loftq_cli.refinement.refine.refine` does."""
        wanted = Refining(device=self.device, offline=offline)
        given = (self.path, self.output, model, self.texts, wanted)
        refine(*given, overwrite=overwrite, observer=observer)
        return open_output(self.output).manifest
