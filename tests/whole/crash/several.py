"""Several processes of one run, as torchrun or srun would start them, on this machine."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.support import places
from tests.whole.crash import processes


def start(
    arguments: Sequence[str | Path],
    directory: Path,
    count: int = 2,
    own: Mapping[int, Sequence[str | Path]] | None = None,
    faults: Mapping[int, Callable[[], None]] | None = None,
) -> list[processes.Running]:
    """``loftq`` with these arguments, and with its ``own``, in each of so many ranks."""
    port = places.free_port()
    return [
        processes.Running(
            [*arguments, *(own or {}).get(rank, ())],
            directory,
            functools.partial(_place, rank, count, port, (faults or {}).get(rank)),
        )
        for rank in range(count)
    ]


def run(
    arguments: Sequence[str | Path],
    directory: Path,
    count: int = 2,
    own: Mapping[int, Sequence[str | Path]] | None = None,
    faults: Mapping[int, Callable[[], None]] | None = None,
) -> list[processes.Ended]:
    """The same, to their end."""
    return [each.end() for each in start(arguments, directory, count, own, faults)]


def _place(rank: int, count: int, port: int, fault: Callable[[], None] | None) -> None:
    os.environ |= places.environment(rank, count, port)
    if fault is not None:
        fault()
