"""What is finished of a refinement: a file for each block, and the journal that says so."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.dtypes import torch_dtype
from loftq_cli.checkpoint.header import StoredTensor, TensorSpec, read_header
from loftq_cli.checkpoint.journal import Journal, subject_in
from loftq_cli.checkpoint.output import MANIFEST, open_output
from loftq_cli.checkpoint.shard_output import ShardOutput
from loftq_cli.checkpoint.stored import Stored, read
from loftq_cli.checkpoint.unfinished import JournaledWorkspace
from loftq_cli.checkpoint.writer import GrowingShard
from loftq_cli.errors import InputError
from loftq_cli.machine.durable import explained
from loftq_cli.machine.world import World
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
        return [self.stages, *self.partial.glob("rank-*")]

    @contextmanager
    def folder(self, world: World) -> Iterator[Path]:
        """Where this process may put what it needs while it works."""
        own = self.partial if world.first else self.partial / f"rank-{world.rank}"
        with explained(own):
            own.mkdir(parents=True, exist_ok=True)
        try:
            yield own
        finally:
            if not world.first:
                shutil.rmtree(own, ignore_errors=True)
                with suppress(OSError):  # rank 0's, unless that is on another disk
                    self.partial.rmdir()

    def _files(self) -> list[Path]:
        return [*super()._files(), self.partial / ACTIVATIONS]


class Stages:
    """The finished parts of a refinement, by title, in files of ``folder``: rank 0's, who tells the
    other processes of ``world`` what is in them. Those have no ``journal``."""

    def __init__(self, folder: Path, journal: Journal | None, world: World) -> None:
        self._folder, self._held, self._world = folder, journal, world
        if world.first:
            with explained(folder):
                folder.mkdir(exist_ok=True)

    @property
    def _journal(self) -> Journal:
        assert self._held is not None, "only rank 0 writes"
        return self._held

    def record(self, title: str, specs: Sequence[TensorSpec]) -> dict[str, Any] | None:
        """What was recorded of a part, if all of it is there as it was written."""
        found: dict[str, Any] | None = self._world.told(lambda: self._record(title, specs))
        return found

    def _record(self, title: str, specs: Sequence[TensorSpec]) -> dict[str, Any] | None:
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
        if not self._world.first:
            return
        with self._opened(title, specs) as shard:
            name = shard.path.name
            ShardOutput(self._journal, {name: shard}, name).write(
                title, "", {name: tensors}, record
            )

    def stored(self, titles: Sequence[str]) -> Stored:
        """Where the tensors of finished parts are; those of later ``titles`` win. Nothing on others
        than rank 0."""
        found: dict[str, tuple[Path, StoredTensor]] = {}
        for title in titles if self._world.first else ():
            path = self._file(title)
            found.update({tensor.name: (path, tensor) for tensor in read_header(path).tensors})
        return found

    def read(self, specs: Sequence[TensorSpec], stored: Stored) -> dict[str, torch.Tensor]:
        """The tensors of ``specs``, as rank 0 has them ``stored``."""
        found = {}
        for spec in specs:
            if self._world.first:
                tensor = read(self._folder, stored, spec)
            else:
                tensor = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
            self._world.spread(tensor)
            found[spec.name] = tensor
        return found

    def begun(self, specs: Sequence[TensorSpec], stored: Stored) -> dict[str, torch.Tensor] | None:
        """As :meth:`read`; None if they are not among what is stored."""
        there = self._world.told(lambda: specs[0].name in stored)
        return self.read(specs, stored) if there else None

    def _file(self, title: str) -> Path:
        return self._folder / f"{title}.safetensors"

    def _opened(self, title: str, specs: Sequence[TensorSpec]) -> GrowingShard:
        return GrowingShard(self._file(title), specs)
