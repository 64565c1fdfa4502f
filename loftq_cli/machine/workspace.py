"""The life of an output directory: absent, partial, complete, and nothing in between.

Work happens in a hidden directory beside the output, ``.<name>.<suffix>/``::

    lock       held (flock) while a process works
    output/    the future output directory, renamed into place at the end
    replaced/  the old output under --overwrite, from that rename until it is deleted
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loftq_cli.errors import EnvironmentFailure, OutputConflictError
from loftq_cli.machine.durable import explained, make_directory, sync_directory, sync_tree
from loftq_cli.machine.resources import check_permissions


class Workspace:
    """Paths of one output and of the work on it. A kind of output is a subclass."""

    suffix: str
    marker: str
    """The file by which an output that may be replaced is known."""
    kind: str
    doing: str
    """What another process is doing to the output while it holds the lock."""

    def __init__(self, output: Path) -> None:
        self.final = output
        self.partial = output.parent / f".{output.name}.{self.suffix}"
        self.output = self.partial / "output"
        self._lock_file = self.partial / "lock"
        self._replaced = self.partial / "replaced"

    def holds_work(self) -> bool:
        """Whether there is unfinished work, to be gone on with."""
        return False

    @contextmanager
    def locked(self, *, shared: bool = False, needed: bool = True) -> Iterator[None]:
        """Hold the lock, in a partial directory that is made for it and, unless there is
        unfinished work in it, removed again; ``shared`` with others that hold it so, and without it
        where the file system has no locks, unless it is ``needed``. Raises OutputConflictError if
        another process holds it otherwise."""
        descriptor = self._lock(fcntl.LOCK_SH if shared else fcntl.LOCK_EX, needed)
        try:
            yield
        finally:
            try:
                # Once we have published, the directory may be another process's already.
                if self._is_lock(descriptor) and not self.holds_work():
                    with suppress(BlockingIOError):  # others are at it
                        _flock(descriptor, fcntl.LOCK_EX, needed)
                        self.discard()
            finally:
                os.close(descriptor)

    def _lock(self, kind: int, needed: bool) -> int:
        while True:
            with explained(self.partial):
                make_directory(self.partial)
                try:
                    descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o666)
                except FileNotFoundError:
                    continue  # its holder finished and removed the directory
            try:
                with explained(self._lock_file):
                    _flock(descriptor, kind, needed)
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
        """Raise EnvironmentFailure if what is there already could not be worked in, or moved
        away in the end."""
        for directory in (self.partial, self.output, self.final):
            if directory.is_dir():
                check_permissions(directory)

    def refuse_other_output(self, overwrite: bool, held: Callable[[], str] | None = None) -> None:
        """Raise OutputConflictError if the output exists and may not be replaced; ``held``: what
        it is said to be, None for its kind."""
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
            raise OutputConflictError(f"{self.final} holds {held() if held else self.kind}")

    def publish(self, overwrite: bool, held: Callable[[], str] | None = None) -> None:
        """Rename the finished output into place and remove everything else.

        Raises OutputConflictError if the output came into being meanwhile, ``held`` being what it
        is said to be.
        """
        self.refuse_other_output(overwrite, held)
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
            if self.output.exists():
                shutil.rmtree(self.output)

    def discard(self) -> None:
        """Remove the partial directory, and in it what is ours. The lock last: until it is gone
        nobody else begins there."""
        with explained(self.partial):
            self._put_back()
        for directory in (self.output, *self._folders(), self._replaced):
            shutil.rmtree(directory, ignore_errors=True)
        with suppress(OSError):  # as much of it as can be: nothing depends on it any more
            for file in (*self._files(), self._lock_file):
                file.unlink(missing_ok=True)
            self.partial.rmdir()

    def _folders(self) -> list[Path]:
        """What else of ours is in the partial directory: folders."""
        return []

    def _files(self) -> list[Path]:
        """And files."""
        return []


def _flock(descriptor: int, kind: int, needed: bool) -> None:
    """Take the lock, or raise OSError; where there are none, and none is ``needed``, do nothing."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if needed or error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
