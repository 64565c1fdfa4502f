"""The life of an output that is gone on with after an accident.

Beside what every workspace has there is ``journal`` in the partial directory: what is finished.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import ClassVar

from loftq_cli.checkpoint.differences import differences
from loftq_cli.checkpoint.journal import Subject, subject_in
from loftq_cli.errors import OutputConflictError
from loftq_cli.machine.durable import explained
from loftq_cli.machine.workspace import Workspace


class JournaledWorkspace(Workspace):
    """Paths of one output and of the journaled work on it."""

    work: ClassVar[str]
    """What unfinished work is called."""

    def __init__(self, output: Path) -> None:
        super().__init__(output)
        self.journal = self.partial / "journal"

    def holds_work(self) -> bool:
        return self.journal.exists()

    def keep_only(self, names: Collection[str]) -> None:
        """Remove all files but these from the unfinished output: what a crash left of the files
        that are written last must not be taken for theirs."""
        kept = {self.output / name for name in names}
        with explained(self.output):
            for path in [path for path in self.output.rglob("*") if path.is_file()]:
                if path not in kept:
                    path.unlink()

    def refuse_other_partial(self, accepted: Mapping[str, Subject], overwrite: bool) -> str | None:
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
                f"{self.partial} holds an unfinished {self.work} with other settings: "
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

    def discard_work(self) -> None:
        with explained(self.partial):
            self.journal.unlink(missing_ok=True)
        super().discard_work()

    def _files(self) -> list[Path]:
        return [self.journal]
