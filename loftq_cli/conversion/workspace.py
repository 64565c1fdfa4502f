"""The life of a conversion's output, which is gone on with after an accident.

Beside what every workspace has there are in ``.<name>.loftq-partial/``::

    journal    what is finished (see journal.py)
    source     which commit of a hub repository it is of (see pin.py)
    shards/    shards of a hub model that do not stay
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.output import MANIFEST, Output, open_output
from loftq_cli.conversion.differences import differences, different_settings
from loftq_cli.conversion.journal import Subject, subject_in
from loftq_cli.errors import InputError, OutputConflictError
from loftq_cli.machine.durable import explained
from loftq_cli.machine.workspace import Workspace


class ConversionWorkspace(Workspace):
    """Paths of one conversion and of the work on it."""

    suffix = "loftq-partial"
    marker = MANIFEST
    kind = "the output of a conversion"
    doing = "converting to"

    def __init__(self, output: Path) -> None:
        super().__init__(output)
        self.journal = self.partial / "journal"
        self.pin = self.partial / "source"
        self.passing = self.partial / "shards"

    def holds_work(self) -> bool:
        return self.journal.exists()

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

    def keep_only(self, names: Collection[str]) -> None:
        """Remove all files but these from the unfinished output: what a crash left of the files
        that are written last must not be taken for theirs."""
        kept = {self.output / name for name in names}
        with explained(self.output):
            for path in [path for path in self.output.rglob("*") if path.is_file()]:
                if path not in kept:
                    path.unlink()

    def refuse_other_partial(self, accepted: dict[str, Subject], overwrite: bool) -> str | None:
        """Whose work the partial directory holds: one of the ``accepted`` fingerprints, or None
        if there is none. Work of something else is discarded under ``overwrite``, and
        otherwise raises OutputConflictError with the settings that differ."""
        found = subject_in(self.journal)
        if found is None:
            self.discard_work()
            return None
        if found.fingerprint in accepted:
            return found.fingerprint
        if not overwrite:
            wanted = next(iter(accepted.values()))
            raise OutputConflictError(
                f"{self.partial} holds an unfinished conversion with other settings: "
                + differences(found, wanted),
                hint="finish it with its own settings, or discard it with --overwrite",
            )
        self.discard_work()
        return None

    def discard_unless_other(self, accepted: dict[str, Subject]) -> None:
        """Remove the partial directory, unless it holds unfinished work of something else."""
        found = subject_in(self.journal)
        if found is None or found.fingerprint in accepted:
            self.discard()

    def described(self, wanted: Subject) -> str:
        """What an output of ours is that is not the ``wanted`` one."""
        try:
            recipe = open_output(self.final).manifest["recipe"]
            what = "; ".join(different_settings(recipe, wanted.recipe)) or "it is of another source"
        except InputError as error:
            what = error.message
        return f"another conversion: {what}"

    def discard_work(self) -> None:
        with explained(self.partial):
            self.journal.unlink(missing_ok=True)
        super().discard_work()

    def _folders(self) -> list[Path]:
        return [self.passing]

    def _files(self) -> list[Path]:
        return [self.journal, self.pin]
