"""One conversion by 1, 2 and 4 processes of one thread, from disk: how even, and at what cost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.support import checkpoints, places

OPTIONS = ("--bits", "2", "-t", "1", "--layout", "loftq", "-q")
PROCESSES = (1, 2, 4)


@dataclass(frozen=True)
class Run:
    """A conversion by ``shares`` processes: seconds by the clock, seconds of CPU of all together
    without importing, and of each one's share of the work."""

    wall: float
    cpu: float
    shares: list[float]


def model(directory: Path, layers: int, hidden: int) -> Path:
    """A Llama in bfloat16 of a shard for every four layers, written anew if it is another."""
    path = directory / f"model-{layers}-{hidden}"
    if not path.exists():
        tensors = checkpoints.llama(hidden, hidden * 11 // 4 // 64 * 64, layers, torch.bfloat16)
        cuts = range(1 + 4 * 8, 1 + layers * 8, 4 * 8)
        checkpoints.write(path, tensors, cuts=tuple(cuts))
    return path


def forget(path: Path) -> None:
    """Have the files below ``path`` read from disk the next time."""
    for file in (each for each in path.rglob("*") if each.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def convert(source: Path, work: Path, count: int) -> tuple[Run, dict[str, object]]:
    """Convert with so many processes; what it took, and what came of it."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    forget(source)
    port = places.free_port()
    began = time.monotonic()
    running = []
    for rank in range(count):
        several = places.environment(rank, count, port)
        words = ["convert", str(source), "-o", str(work / "out"), *OPTIONS]
        running.append(
            subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.rank", str(work / f"{rank}.json"), *words],
                env={**os.environ, "OMP_NUM_THREADS": "1", **(several if count > 1 else {})},
                stdout=subprocess.DEVNULL,
            )
        )
    for process in running:
        assert process.wait() == 0
    wall = time.monotonic() - began
    told = [json.loads((work / f"{rank}.json").read_text()) for rank in range(count)]
    found = checkpoints.comparable(work / "out")
    run = Run(wall, sum(each["cpu"] for each in told), [each["share"] for each in told])
    shutil.rmtree(work)
    return run, found


def table(directory: Path, layers: int, hidden: int) -> Iterator[str]:
    """The measurement, as lines of a table; the outputs are compared byte by byte."""
    source = model(directory, layers, hidden)
    size = sum(path.stat().st_size for path in source.iterdir())
    yield f"{layers} layers of {hidden}, {size / 1e9:.2f} GB in bfloat16, {os.cpu_count()} CPUs:"
    yield ""
    yield "| processes | seconds | CPU seconds | more than one | of each share | largest to mean |"
    yield "| --- | --- | --- | --- | --- | --- |"
    first = None
    for count in PROCESSES:
        run, found = convert(source, directory / "work", count)
        first = first or (run, found)
        assert found == first[1], f"{count} processes made other bytes"
        mean = sum(run.shares) / count
        shares = ", ".join(f"{share:.1f}" for share in run.shares) if count > 1 else ""
        even = f"{max(run.shares) / mean - 1:+.1%}" if count > 1 else ""
        more = f"{run.cpu / first[0].cpu - 1:+.1%}" if count > 1 else ""
        yield f"| {count} | {run.wall:.1f} | {run.cpu:.1f} | {more} | {shares} | {even} |"
