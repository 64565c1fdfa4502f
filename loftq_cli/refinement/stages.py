"""What is finished of a refinement: a file for each block, and the journal that says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.header import StoredTensor, TensorSpec, read_header
from loftq_cli.checkpoint.journal import Journal, subject_in
from loftq_cli.checkpoint.output import MANIFEST, open_output
from loftq_cli.checkpoint.shard_output import ShardOutput
from loftq_cli.checkpoint.unfinished import JournaledWorkspace
from loftq_cli.checkpoint.writer import GrowingShard
from loftq_cli.errors import InputError
from loftq_cli.machine.durable import explained
from loftq_cli.refinement.chains import ACTIVATIONS
from loftq_cli.refinement.settings import Refining


class RefineWorkspace(JournaledWorkspace):
    """The life of a refinement. Beside what every journaled workspace has there is ``stages/``, a
    file for each finished block."""

    suffix = "loftq-refine"
    marker = MANIFEST
    kind = "a conversion"
    doing = "refining to"
    work = "refinement"

    def __init__(self, output: Path) -> None:
        super().__init__(output)
        self.stages = self.partial / "stages"

    def wanted(self, asked: Refining) -> Refining:
        """What is ``asked`` for; what that leaves open is as unfinished work, or a finished output,
        has it, which may have been begun with more memory free."""
        found = subject_in(self.journal)
        settings = None if found is None else found.recipe
        if settings is None and (self.final / MANIFEST).is_file():
            with suppress(InputError):
                told = open_output(self.final).manifest.get("refined")
                settings = told and told["settings"]
        if settings is None or asked.epochs is not None or asked.end_to_end is not None:
            return asked
        return replace(asked, epochs=settings["epochs"], end_to_end=settings["end_to_end"])

    def discard_work(self) -> None:
        super().discard_work()
        with explained(self.stages):
            for file in self.stages.glob("*") if self.stages.is_dir() else ():
                file.unlink()

    def _folders(self) -> list[Path]:
        return [self.stages]

    def _files(self) -> list[Path]:
        return [*super()._files(), self.partial / ACTIVATIONS]


class Stages:
    """The finished parts of a refinement, by title, in files of ``folder``."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self._folder, self._journal = folder, journal
        with explained(folder):
            folder.mkdir(exist_ok=True)

    def record(self, title: str, specs: Sequence[TensorSpec]) -> dict[str, Any] | None:
        """What was recorded of a part, if all of it is there as it was written."""
        if title not in self._journal.units or not self._file(title).is_file():
            return None
        with self._opened(title, specs) as shard:
            unit = ShardOutput(self._journal, {shard.path.name: shard}, shard.path.name)
            found = unit.finished(title)
        return None if found is None else found.record

    def write(
        self,
        title: str,
        tensors: Mapping[str, torch.Tensor],
        specs: Sequence[TensorSpec],
        record: dict[str, Any],
    ) -> None:
        """Make a part durable, and then say so."""
        with self._opened(title, specs) as shard:
            name = shard.path.name
            ShardOutput(self._journal, {name: shard}, name).write(
                title, "", {name: tensors}, record
            )

    def stored(self, titles: Sequence[str]) -> dict[str, tuple[Path, StoredTensor]]:
        """Where the tensors of finished parts are; those of later ``titles`` win."""
        found = {}
        for title in titles:
            path = self._file(title)
            found.update({tensor.name: (path, tensor) for tensor in read_header(path).tensors})
        return found

    def _file(self, title: str) -> Path:
        return self._folder / f"{title}.safetensors"

    def _opened(self, title: str, specs: Sequence[TensorSpec]) -> GrowingShard:
        return GrowingShard(self._file(title), specs)
