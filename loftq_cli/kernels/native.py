"""The C kernels (kernels/), compiled for this machine when they are first needed.

The build takes a few seconds and is kept in the user's cache; if there is no compiler everything
runs without it, in tensor operations.

Set ``LOFTQ_NATIVE=0`` to do without, ``CC`` to choose the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from queue import Empty, SimpleQueue
from types import MappingProxyType

import torch

from loftq_cli.machine.threads import Task, Worker, settle

_SOURCES = Path(__file__).parent
# Reordered sums are wanted (they vectorize); NaN and Inf must keep their meaning. Not -ffast-math:
# up to GCC 12 a library linked with it flushes subnormals to zero in the whole process.
_FLAGS = (
    *("-O3", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"),
    "-ffp-contract=off",  # gcc does so in ISO C, clang when told: the bits are those of tensors
    *("-fPIC", "-std=c11"),
)
_TUNING = tuple(
    (*processor, *threads)
    for threads in (("-fopenmp",), ())
    for processor in (("-march=native",), ("-mcpu=native",), ())
)
_TASKS_PER_THREAD = 4
_DONE, _NO_MEMORY = 0, 1

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers of dtypes in kernels/common.h."""


@dataclass(frozen=True)
class Kernels:
    """The loaded library, or why there is none."""

    library: ctypes.CDLL | None
    reason: str


@functools.cache
def load() -> Kernels:
    """Build or find the library. Never raises."""
    if os.environ.get("LOFTQ_NATIVE") == "0":
        return Kernels(None, "LOFTQ_NATIVE=0")
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        return Kernels(None, "no C compiler found")
    try:
        target = _build(compiler)
        try:
            library = ctypes.CDLL(str(target))
        except OSError:  # damaged in the cache
            target.unlink(missing_ok=True)
            library = ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        return Kernels(None, f"the C kernels could not be built: {error}")
    return Kernels(library, "")


def available() -> bool:
    """Whether the compiled kernels can be used here."""
    return load().library is not None


def _build(compiler: str) -> Path:
    """Path of the shared library, from the cache or newly built. Raises OSError or
    SubprocessError."""
    files = sorted(path for path in _SOURCES.iterdir() if path.suffix in (".c", ".h"))
    source = b"".join(path.read_bytes() for path in files)
    units = [path for path in files if path.suffix == ".c"]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(b"\0".join((source, version, repr(_FLAGS).encode(), _processor())))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loftq"
    target = cache / f"kernels-{key.hexdigest()[:24]}.so"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        built = Path(scratch) / "kernels.so"
        for tuning in _TUNING:
            failure = _compile(compiler, tuning, units, built)
            if failure is None:
                with built.open("rb") as file:
                    os.fsync(file.fileno())  # a loss of power must not leave the name alone
                os.replace(built, target)
                return target
    raise OSError(failure)


def _compile(
    compiler: str, tuning: Sequence[str], units: Sequence[Path], built: Path
) -> str | None:
    """Make the library ``built``, its units at the same time; the last line of what the compiler
    says if it fails."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [compiler, *_FLAGS, *tuning, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    objects = [built.with_name(f"{unit.stem}.o") for unit in units]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda unit, to: run("-c", unit, "-o", to), units, objects))
    if not any(result.returncode for result in results):
        results = [run("-shared", "-o", built, *objects, "-lm")]
    for result in results:
        if result.returncode:
            return (result.stderr.strip().splitlines() or ["compiler failed"])[-1]
    return None


def _processor() -> bytes:
    """What -march=native depends on: a cache shared between machines must not mix builds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    wanted = ("flags", "Features", "model name")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)})).encode()


def function(name: str) -> Callable[..., int]:
    """A function of the library, which must be available."""
    library = load().library
    assert library is not None
    return getattr(library, name)  # type: ignore[no-any-return]


def run(
    name: str,
    call: ctypes.Structure,
    count: int,
    failures: Mapping[int, Exception] = MappingProxyType({}),
) -> None:
    """A function of the library on ``count`` independent units, which are divided among threads.
    Raises MemoryError if it has none, of ``failures`` that of what else it returns."""
    found = function(name)

    def work(first: int, last: int) -> None:
        status = found(ctypes.byref(call), ctypes.c_int64(first), ctypes.c_int64(last))
        if status == _NO_MEMORY:
            raise MemoryError
        if status != _DONE:
            raise failures[status]

    divide(work, count)


def divide(work: Callable[[int, int], None], count: int) -> None:
    """Run ``work(first, last)`` over ranges of ``count`` independent units on as many threads as
    torch uses, this one among them; ctypes releases the interpreter's lock."""
    threads = torch.get_num_threads()
    tasks = min(threads * _TASKS_PER_THREAD, count)
    if threads == 1 or tasks <= 1:
        work(0, count)
        return
    edges = [count * number // tasks for number in range(tasks + 1)]
    ranges: SimpleQueue[tuple[int, int]] = SimpleQueue()
    for first, last in pairwise(edges):
        ranges.put((first, last))

    def take() -> None:
        with suppress(Empty):
            while True:
                work(*ranges.get_nowait())

    helpers = [Task(take) for _ in range(threads - 1)]
    try:
        for worker, helper in zip(_workers(threads - 1), helpers, strict=True):
            worker.submit(helper)
        take()
    finally:
        settle(helpers)  # also when interrupted: what the others write to must outlive them
    for helper in helpers:
        if not helper.cancel():
            helper.result()


@functools.cache
def _workers(count: int) -> tuple[Worker, ...]:
    return tuple(Worker() for _ in range(count))


def team(count: int) -> int:
    """Threads for a function that divides its ``count`` units with OpenMP. Its threads do not
    survive a fork, and GCC's OpenMP would wait for them for ever: one in a forked process."""
    return 1 if _forked else max(min(torch.get_num_threads(), count), 1)


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True
    _workers.cache_clear()  # a child has none of the threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
