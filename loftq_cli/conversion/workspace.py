"""The life of an output directory: absent, partial, complete, and nothing in between.

Work happens in ``.<name>.loftq-partial/`` beside the output::

    lock       held (flock) while a conversion runs
    journal    what is finished (see journal.py)
    output/    the future output directory, renamed into place at the end
    replaced/  the old output under --overwrite, from that rename until it is deleted
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loftq_cli.checkpoint.durable import explained, sync_directory
from loftq_cli.conversion.journal import Identity, identify
from loftq_cli.errors import EnvironmentFailure, InputError, OutputConflictError, UsageError
from loftq_cli.reporting.output import MANIFEST, Output, open_output


class Workspace:
    """Paths of one output and of the work on it."""

    def __init__(self, output: Path) -> None:
        self.final = output
        self.partial = output.parent / f".{output.name}.loftq-partial"
        self.output = self.partial / "output"
        self.journal = self.partial / "journal"
        self._replaced = self.partial / "replaced"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock, in a partial directory that is made for it and, unless there is
        unfinished work in it, removed again. Raises OutputConflictError where another process
        holds it."""
        descriptor = self._lock()
        try:
            yield
        finally:
            if self.partial.exists() and not self.journal.exists():
                self.discard()
            os.close(descriptor)

    def _lock(self) -> int:
        lock = self.partial / "lock"
        while True:
            with explained(self.partial):
                self.partial.parent.mkdir(parents=True, exist_ok=True)
                self.partial.mkdir(exist_ok=True)
                descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its holder may have finished and removed the file between open and flock.
                if os.fstat(descriptor).st_ino == os.stat(lock).st_ino:
                    return descriptor
            except FileNotFoundError:
                pass
            except BlockingIOError:
                os.close(descriptor)
                raise OutputConflictError(
                    f"{self.final}: another process is converting to it",
                    hint="wait for it, or choose another --output",
                ) from None
            os.close(descriptor)

    def complete_output(self) -> Output | None:
        """The output where it is there and readable, else None."""
        try:
            return open_output(self.final)
        except InputError:
            return None

    def written(self) -> int:
        """Bytes of unfinished work."""
        files = (path for path in self.output.rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in files)

    def refuse_other_partial(self, accepted: dict[str, Identity], overwrite: bool) -> str | None:
        """Whose work the partial directory holds: one of the ``accepted`` fingerprints, or None
        where there is none. Work of something else is discarded under ``overwrite``, and
        otherwise raises OutputConflictError with the settings that differ."""
        found = identify(self.journal)
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

    def refuse_other_output(self, overwrite: bool) -> None:
        """Raise OutputConflictError where the output exists and may not be replaced."""
        if not self.final.exists() and not self.final.is_symlink():
            return
        if self.final.is_dir() and not any(self.final.iterdir()):
            return
        ours = (self.final / MANIFEST).is_file()
        if not ours:
            raise OutputConflictError(
                f"{self.final} exists and is not the output of a conversion",
                hint="choose another --output; --overwrite replaces only loftq's own outputs",
            )
        if not overwrite:
            raise OutputConflictError(
                f"{self.final} holds a conversion of something else or with other settings"
            )

    def publish(self) -> None:
        """Rename the finished output into place and remove everything else."""
        with explained(self.final):
            for directory, _, _ in os.walk(self.output):
                sync_directory(Path(directory))
            if self.final.is_dir() and any(self.final.iterdir()):
                os.rename(self.final, self._replaced)
            os.rename(self.output, self.final)
            sync_directory(self.final.parent)
            shutil.rmtree(self.partial)
            sync_directory(self.final.parent)

    def discard_work(self) -> None:
        """Remove unfinished work, but not the directory with the lock that we hold."""
        with explained(self.partial):
            self.journal.unlink(missing_ok=True)
            if self.output.exists():
                shutil.rmtree(self.output)

    def discard(self) -> None:
        """Remove the whole partial directory."""
        with explained(self.partial):
            if self._replaced.exists() and not self.final.exists():
                os.rename(self._replaced, self.final)
            shutil.rmtree(self.partial, ignore_errors=True)


def check_output_path(output: Path, source: Path) -> None:
    """Raise UsageError where the output is the source directory or lies inside it."""
    real_output, real_source = output.resolve(), source.resolve()
    if real_output == real_source or real_source in real_output.parents:
        raise UsageError(
            f"--output {output} is inside the input {source}", hint="choose a directory outside it"
        )


def check_space(directory: Path, needed: int) -> None:
    """Raise EnvironmentFailure where the disk of ``directory`` (or of its nearest existing parent)
    lacks ``needed`` bytes, or cannot be written."""
    while not directory.exists():
        directory = directory.parent
    if not os.access(directory, os.W_OK):
        raise EnvironmentFailure(f"{directory}: not writable", hint="choose another --output")
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise EnvironmentFailure(
            f"{directory}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free",
            hint="free space or choose an --output on another disk",
        )


def differences(found: Identity, wanted: Identity) -> str:
    """The settings and source files in which two conversions differ, both values shown."""
    parts = [
        f"{name} {found.recipe.get(name)!r} there, {wanted.recipe.get(name)!r} now"
        for name in sorted({*found.recipe, *wanted.recipe})
        if found.recipe.get(name) != wanted.recipe.get(name)
    ]
    there = {tuple(entry) for entry in found.sources}
    now = {tuple(entry) for entry in wanted.sources}
    parts += [f"source file {name} differs" for name in sorted({entry[0] for entry in there ^ now})]
    return "; ".join(parts) or "the fingerprints differ"
