"""The life of a conversion's output, which is gone on with after an accident.

Beside what every workspace has there are in ``.<name>.loftq-partial/``::

    journal    what is finished (see journal.py)
    journals/  the same, of other processes that share the work: a file each
    source     which commit of a hub repository it is of (see pin.py)
    shards/    shards of a hub model that do not stay
    pairs      adapters of single experts, until they are fused
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.differences import different_settings
from loftq_cli.checkpoint.journal import Subject, subject_in
from loftq_cli.checkpoint.output import MANIFEST, Output, open_output
from loftq_cli.checkpoint.unfinished import JournaledWorkspace
from loftq_cli.errors import InputError
from loftq_cli.machine.durable import explained, make_directory


class ConversionWorkspace(JournaledWorkspace):
    """Paths of one conversion and of the work on it."""

    suffix = "loftq-partial"
    marker = MANIFEST
    kind = "the output of a conversion"
    doing = "converting to"
    work = "conversion"

    def __init__(self, output: Path) -> None:
        super().__init__(output)
        self.journals = self.partial / "journals"
        self.pin = self.partial / "source"
        self.passing = self.partial / "shards"
        self.pairs = self.partial / "pairs"

    def others(self) -> list[Path]:
        """The journals of other processes that share the work, or have shared it."""
        return sorted(self.journals.glob("*-*.journal"))

    def new_journal(self, whose: str) -> Path:
        """Where a process that shares the work is to keep its own journal: a file of nobody
        else."""
        with explained(self.journals):
            make_directory(self.journals)
        return self.journals / f"{whose}.{secrets.token_hex(4)}.journal"

    def discard_work(self) -> None:
        with explained(self.journals):
            if self.journals.exists():
                shutil.rmtree(self.journals)
        super().discard_work()

    def complete_output(self) -> Output | None:
        """The output if it is there and readable, else None."""
        try:
            return open_output(self.final)
        except InputError:
            return None

    def held(self, *, finished: bool = True) -> Iterator[tuple[dict[str, Any], str]]:
        """(recipe, fingerprint) of the unfinished work and, if ``finished``, of the complete
        output, what there is of them."""
        work = subject_in(self.journal)
        if work is not None:
            yield work.recipe, work.fingerprint
        output = self.complete_output() if finished else None
        if output is not None:
            yield output.manifest["recipe"], output.fingerprint

    def described(self, wanted: Subject) -> str:
        """What an output of ours is that is not the ``wanted`` one."""
        try:
            recipe = open_output(self.final).manifest["recipe"]
            what = "; ".join(different_settings(recipe, wanted.recipe)) or "it is of another source"
        except InputError as error:
            what = error.message
        return f"another conversion: {what}"

    def _folders(self) -> list[Path]:
        return [self.passing, self.journals]

    def _files(self) -> list[Path]:
        return [*super()._files(), self.pin, self.pairs]
