"""``loftq`` in processes of their own, which end however a test wants them to.

A fork server imports torch once; every process is then a real one, but starts at once.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["loftq_cli.cli", "loftq_cli.conversion.run", __name__])

# What changes files. Path and shutil call these too.
_MUTATING = (
    *("open", "write", "pwrite", "ftruncate", "fsync"),
    *("mkdir", "rmdir", "rename", "replace", "unlink"),
)


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (minus the signal's number) and what it said."""

    code: int
    stdout: str
    stderr: str


def loftq(
    arguments: Sequence[str | Path], directory: Path, fault: Callable[[], None] | None = None
) -> Ended:
    """Run ``loftq`` in a process; ``fault`` is called in it first."""
    said = [directory / f".{name}" for name in ("stdout", "stderr")]
    words = [str(argument) for argument in arguments]
    process = _CONTEXT.Process(target=_run, args=(words, said, fault))
    process.start()
    process.join()
    code = process.exitcode
    process.close()
    assert code is not None
    texts = [path.read_text() for path in said]
    for path in said:
        path.unlink()
    return Ended(code, *texts)


def killed_at(call: int) -> Callable[[], None]:
    """A fault: SIGKILL instead of the given call, counted from 1, of those that change files. Of a
    write the first half still happens."""
    return functools.partial(_kill_at, call)


def limited_to(size: int) -> Callable[[], None]:
    """A fault: no file may grow beyond ``size`` bytes."""
    return functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))


def _run(arguments: list[str], said: list[Path], fault: Callable[[], None] | None) -> None:
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    from loftq_cli.cli import main

    if fault is not None:
        fault()
    main(arguments, prog_name="loftq")


def _kill_at(call: int) -> None:
    left = call

    def wrap(function: Any) -> Any:
        name = function.__name__

        @functools.wraps(function)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if name != "open" or arguments[1] & os.O_CREAT:
                left -= 1
            if left == 0:
                if name in ("write", "pwrite"):
                    descriptor, content, *offset = arguments
                    function(descriptor, content[: len(content) // 2], *offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapped

    for name in _MUTATING:
        setattr(os, name, wrap(getattr(os, name)))
