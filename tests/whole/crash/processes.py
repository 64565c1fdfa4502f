"""``loftq`` in processes of their own, which end however a test wants them to.

A fork server imports torch and transformers once; every process is then a real one, but starts at
once.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *("loftq_cli.cli", "loftq_cli.conversion.run", "loftq_cli.refinement.refine"),
        *("transformers.models.llama.modeling_llama", "accelerate", __name__),
    ]
)

_NUMBERS = itertools.count()

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


class Running:
    """A process in which ``loftq`` runs; ``directory`` takes what it says."""

    def __init__(
        self,
        arguments: Sequence[str | Path],
        directory: Path,
        fault: Callable[[], None] | None = None,
    ) -> None:
        self._said = [directory / f".{name}.{next(_NUMBERS)}" for name in ("stdout", "stderr")]
        words = [str(argument) for argument in arguments]
        self._process = _CONTEXT.Process(target=_run, args=(words, self._said, fault))
        self._process.start()

    @property
    def is_over(self) -> bool:
        return not self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless it is over."""
        assert self._process.pid is not None
        if not self.is_over:
            os.kill(self._process.pid, number)

    def end(self) -> Ended:
        """Wait for its end."""
        self._process.join()
        code = self._process.exitcode
        self._process.close()
        assert code is not None
        texts = [path.read_text() if path.exists() else "" for path in self._said]
        for path in self._said:
            path.unlink(missing_ok=True)
        return Ended(code, *texts)


def loftq(
    arguments: Sequence[str | Path], directory: Path, fault: Callable[[], None] | None = None
) -> Ended:
    """Run ``loftq`` in a process; ``fault`` is called in it first."""
    return Running(arguments, directory, fault).end()


def killed_at(call: int) -> Callable[[], None]:
    """A fault: SIGKILL instead of the given call, counted from 1, of those that change files. Of a
    write the first half still happens."""
    return functools.partial(_kill_at, call)


def limited_to(size: int) -> Callable[[], None]:
    """A fault: no file may grow beyond ``size`` bytes."""
    return functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))


def allowed(memory: int) -> Callable[[], None]:
    """A fault: the process may get ``memory`` bytes of address space and no more."""
    return functools.partial(_allow, memory)


def _allow(memory: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _run(arguments: list[str], said: list[Path], fault: Callable[[], None] | None) -> None:
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    from loftq_cli.cli.commands import main

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
