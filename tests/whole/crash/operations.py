"""Every operation of this process on files below a directory, handed to whoever wants to watch it,
let it fail, or die at it.

The real functions of ``os`` do the work; what is in between decides whether, and how much of it.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# What changes files. Path and shutil call these too.
_BY_DESCRIPTOR = ("write", "pwrite", "ftruncate", "fsync", "preadv")
_BY_PATH = ("open", "mkdir", "rmdir", "rename", "replace", "unlink")


@dataclass(frozen=True)
class Operation:
    """A call of ``os.NAME`` on ``path`` (of a rename: from there to ``target``)."""

    name: str
    path: str
    arguments: tuple[Any, ...]
    perform: Callable[..., Any]
    target: str = ""

    @property
    def changes(self) -> bool:
        """Whether it changes anything on disk, or makes a change durable."""
        if self.name == "open":
            return bool(self.arguments[1] & os.O_CREAT)
        return self.name not in ("preadv", "io.open")

    def __call__(self) -> Any:
        return self.perform(*self.arguments)

    def half(self) -> None:
        """Of a write the first half of its bytes; of anything else nothing."""
        if self.name in ("write", "pwrite"):
            descriptor, content, *offset = self.arguments
            self.perform(descriptor, bytes(content)[: len(content) // 2], *offset)


Act = Callable[[Operation], Any]


@contextmanager
def watched(root: Path, act: Act) -> Iterator[None]:
    """Within, ``act`` is called instead of every operation on what lies in ``root``; it returns
    what the operation returns, or raises. One call at a time, whatever the thread."""
    inside = os.path.realpath(root) + os.sep
    lock = threading.RLock()
    busy = False

    def intercept(operation: Operation) -> Any:
        nonlocal busy
        with lock:
            # What act itself does is not its own business.
            if busy or not (operation.path + os.sep).startswith(inside):
                return operation()
            busy = True
            try:
                return act(operation)
            finally:
                busy = False

    def by_descriptor(name: str) -> Any:
        real = getattr(os, name)

        def call(descriptor: int, *arguments: Any) -> Any:
            where = os.readlink(f"/proc/self/fd/{descriptor}").removesuffix(" (deleted)")
            return intercept(Operation(name, where, (descriptor, *arguments), real))

        return call

    def by_path(name: str) -> Any:
        real = getattr(os, name)

        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            where = _located(path, options.get("dir_fd"))
            target = _located(arguments[0], None) if name in ("rename", "replace") else ""

            def perform(*words: Any) -> Any:
                return real(*words, **options)

            return intercept(Operation(name, where, (path, *arguments), perform, target))

        return call

    def opened(path: Any, *arguments: Any, **options: Any) -> Any:
        def perform(*words: Any) -> Any:
            return opening(*words, **options)

        if not isinstance(path, (str, os.PathLike)):
            return perform(path, *arguments)
        return intercept(Operation("io.open", _located(path, None), (path, *arguments), perform))

    opening = io.open
    with pytest.MonkeyPatch.context() as patches:
        for name in _BY_DESCRIPTOR:
            patches.setattr(os, name, by_descriptor(name))
        for name in _BY_PATH:
            patches.setattr(os, name, by_path(name))
        patches.setattr(io, "open", opened)
        yield


def _located(path: Any, directory: int | None) -> str:
    """The absolute path that a call means, through no links: a renamed one need not exist."""
    text = os.fsdecode(path)
    if directory is not None:
        text = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), text)
    return os.path.abspath(text)


class Crash(BaseException):
    """The process is gone."""


class DiesAt:
    """Act: dies at the given operation that changes something, counted from 1, in the middle of it
    where it is a write. Nothing that the process would still do happens."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.count = 0

    def __call__(self, operation: Operation) -> Any:
        self.count += operation.changes
        if self.count < self.number:
            return operation()
        if self.count == self.number and operation.changes:
            operation.half()
            self.count += 1
        raise Crash


class FailsAt:
    """Act: the given operation of those that ``which`` is true of, counted from 1, fails with the
    error ``code``; under ``lasting`` all later ones too. ``failed``: the paths of the first."""

    def __init__(
        self, number: int, code: int, which: Callable[[Operation], bool], *, lasting: bool
    ) -> None:
        self.number, self.code, self.which, self.lasting = number, code, which, lasting
        self.count = 0
        self.failed: Operation | None = None

    def __call__(self, operation: Operation) -> Any:
        if self.which(operation):
            self.count += 1
            if self.count == self.number or (self.lasting and self.count > self.number):
                self.failed = self.failed or operation
                if self.count == self.number:
                    operation.half()  # a disk fills up in the middle of a write
                raise OSError(self.code, os.strerror(self.code))
        return operation()
