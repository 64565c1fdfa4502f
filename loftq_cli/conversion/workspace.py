"""The life of an output directory: absent, partial, complete, and nothing in between.

Work happens in ``.<name>.loftq-partial/`` beside the output::

    lock       held (flock) while a conversion runs
    journal    what is finished (see journal.py)
    output/    the future output directory, renamed into place at the end
    source     which commit of a hub repository it is of (see pin.py)
    shards/    shards of a hub model that do not stay
    replaced/  the old output under --overwrite, from that rename until it is deleted
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.durable import explained, make_directory, sync_directory, sync_tree
from loftq_cli.checkpoint.output import MANIFEST, Output, open_output
from loftq_cli.conversion.journal import Identity, identify
from loftq_cli.conversion.resources import check_permissions
from loftq_cli.errors import EnvironmentFailure, InputError, OutputConflictError, UsageError

_LONGEST = 200  # characters of a setting's value in a message


class Workspace:
    """Paths of one output and of the work on it."""

    suffix = "loftq-partial"
    marker = MANIFEST
    """The file by which an output that may be replaced is known."""
    kind = "the output of a conversion"
    doing = "converting to"

    def __init__(self, output: Path) -> None:
        self.final = output
        self.partial = output.parent / f".{output.name}.{self.suffix}"
        self.output = self.partial / "output"
        self.journal = self.partial / "journal"
        self.pin = self.partial / "source"
        self.passing = self.partial / "shards"
        self._lock_file = self.partial / "lock"
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
            try:
                # Once we have published, the directory may be another process's already.
                if self._is_lock(descriptor) and not self.journal.exists():
                    self.discard()
            finally:
                os.close(descriptor)

    def _lock(self) -> int:
        while True:
            with explained(self.partial):
                make_directory(self.partial)
                try:
                    descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o666)
                except FileNotFoundError:
                    continue  # its holder finished and removed the directory
            try:
                with explained(self._lock_file):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if self._is_lock(descriptor):
                        return descriptor
            except EnvironmentFailure as error:
                os.close(descriptor)
                if isinstance(error.__cause__, BlockingIOError):
                    raise OutputConflictError(
                        f"{self.final}: another process is {self.doing} it",
                        hint="wait for it, or choose another --output",
                    ) from None
                raise
            os.close(descriptor)  # its holder removed the file between open and flock

    def _is_lock(self, descriptor: int) -> bool:
        try:
            return os.fstat(descriptor).st_ino == self._lock_file.stat().st_ino
        except FileNotFoundError:
            return False

    def is_taken(self) -> bool:
        """Whether there is something under the name of the output."""
        return os.path.lexists(self.final)

    def complete_output(self) -> Output | None:
        """The output where it is there and readable, else None."""
        try:
            return open_output(self.final)
        except InputError:
            return None

    def held(self, *, finished: bool = True) -> Iterator[tuple[dict[str, Any], str]]:
        """(recipe, fingerprint) of the unfinished work and, where ``finished``, of the complete
        output, what there is of them."""
        work = identify(self.journal)
        if work is not None:
            yield work.recipe, work.fingerprint
        output = self.complete_output() if finished else None
        if output is not None:
            yield output.manifest["recipe"], output.fingerprint

    def written(self) -> int:
        """Bytes on disk of unfinished work: shards have their full size from the start, but hold
        no space for what is not written yet."""
        size = 0
        for directory, _, names in os.walk(self.output):
            for name in names:
                with suppress(FileNotFoundError):  # published just now, by another process
                    size += os.stat(os.path.join(directory, name)).st_blocks * 512
        return size

    def check_permissions(self) -> None:
        """Raise EnvironmentFailure where what is there already could not be worked in, or moved
        away in the end."""
        for directory in (self.partial, self.output, self.final):
            if directory.is_dir():
                check_permissions(directory)

    def keep_only(self, names: Collection[str]) -> None:
        """Remove all files but these from the unfinished output: what a crash left of the files
        that are written last must not be taken for theirs."""
        kept = {self.output / name for name in names}
        with explained(self.output):
            for path in [path for path in self.output.rglob("*") if path.is_file()]:
                if path not in kept:
                    path.unlink()

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

    def discard_unless_other(self, accepted: dict[str, Identity]) -> None:
        """Remove the partial directory, unless it holds unfinished work of something else."""
        found = identify(self.journal)
        if found is None or found.fingerprint in accepted:
            self.discard()

    def refuse_other_output(self, wanted: Identity | None, overwrite: bool) -> None:
        """Raise OutputConflictError where the output exists and may not be replaced."""
        if not self.is_taken():
            return
        if os.path.ismount(self.final):
            raise OutputConflictError(
                f"{self.final} is a mount point, onto which nothing can be renamed",
                hint="choose a directory inside it",
            )
        with explained(self.final):
            if self.final.is_dir() and not any(self.final.iterdir()):
                return
            ours = (self.final / self.marker).is_file()
        if not ours:
            raise OutputConflictError(
                f"{self.final} exists and is not {self.kind}",
                hint="choose another --output; --overwrite replaces only loftq's own outputs",
            )
        if not overwrite:
            raise OutputConflictError(f"{self.final} holds {self._held(wanted)}")

    def _held(self, wanted: Identity | None) -> str:
        """What an output of ours is that is not the ``wanted`` one."""
        if wanted is None:
            return self.kind
        try:
            recipe = open_output(self.final).manifest["recipe"]
            what = "; ".join(_differing(recipe, wanted.recipe)) or "it is of another source"
        except InputError as error:
            what = error.message
        return f"another conversion: {what}"

    def publish(self, wanted: Identity | None, overwrite: bool) -> None:
        """Rename the finished output into place and remove everything else.

        Raises OutputConflictError where the output came into being meanwhile.
        """
        self.refuse_other_output(wanted, overwrite)
        with explained(self.final):
            sync_tree(self.output)
            if self.final.is_dir() and any(self.final.iterdir()):
                if self._replaced.exists():  # left by a crash right after an earlier rename
                    shutil.rmtree(self._replaced)
                os.rename(self.final, self._replaced)
            try:
                os.rename(self.output, self.final)
            except BaseException as error:
                self._put_back()
                if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise OutputConflictError(
                        f"{self.final} was written by another process meanwhile",
                        hint="choose another --output",
                    ) from error
                raise
            sync_directory(self.partial)
            sync_directory(self.final.parent)
        self.discard()

    def _put_back(self) -> None:
        if self._replaced.exists() and not self.is_taken():
            os.rename(self._replaced, self.final)
            sync_directory(self.final.parent)

    def discard_work(self) -> None:
        """Remove unfinished work, but not the directory with the lock that we hold."""
        with explained(self.partial):
            self.journal.unlink(missing_ok=True)
            if self.output.exists():
                shutil.rmtree(self.output)

    def discard(self) -> None:
        """Remove the partial directory, and in it what is ours. The lock last: until it is gone
        nobody else begins there."""
        with explained(self.partial):
            self._put_back()
        for directory in (self.output, self.passing, self._replaced):
            shutil.rmtree(directory, ignore_errors=True)
        with suppress(OSError):  # as much of it as can be: nothing depends on it any more
            self.journal.unlink(missing_ok=True)
            self.pin.unlink(missing_ok=True)
            self._lock_file.unlink(missing_ok=True)
            self.partial.rmdir()


def check_output_path(output: Path, source: Path) -> Path:
    """The real path of ``output``. Raises UsageError where it is the source directory, lies inside
    it or around it, or cannot be resolved."""
    real_output, real_source = real_path(output), source.resolve()
    inside = real_output == real_source or real_source in real_output.parents
    if inside or real_output in real_source.parents:
        how = "is inside the input" if inside else "contains the input"
        raise UsageError(f"--output {output} {how} {source}", hint="choose a directory outside it")
    return real_output


def real_path(output: Path) -> Path:
    """``output`` without links. Raises UsageError where it cannot be resolved."""
    try:
        return output.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise UsageError(f"--output {output}: {error}", hint="choose another") from error


def differences(found: Identity, wanted: Identity) -> str:
    """The settings and source files in which two conversions differ, both values shown."""
    parts = _differing(found.recipe, wanted.recipe)
    there = {name: _file(*rest) for name, *rest in found.sources}
    now = {name: _file(*rest) for name, *rest in wanted.sources}
    parts += [
        f"source file {name} {there.get(name, 'absent')} there, {now.get(name, 'absent')} now"
        for name in sorted({*there, *now})
        if there.get(name) != now.get(name)
    ]
    return "; ".join(parts) or "the fingerprints differ"


def _file(size: int, sha256: str) -> str:
    return f"{size} bytes, sha256 {sha256[:16]}…"


def differing_settings(there: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """The names of the settings in which two recipes differ."""
    return {name for name in {*there, *now} if there.get(name) != now.get(name)}


def _differing(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = sorted(differing_settings(there, now))
    if len(names) > 1:  # what was settled follows from the others
        names = [name for name in names if name != "widths"]
    return [
        f"{name} {_short(there.get(name))} there, {_short(now.get(name))} now" for name in names
    ]


def _short(value: Any) -> str:
    """What a message can hold of a setting: there may be an entry for every matrix."""
    text = repr(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
