"""Several processes of one run, as torchrun or srun would start them, on this machine."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.whole.crash import processes


def start(
    arguments: Sequence[str | Path],
    directory: Path,
    count: int = 2,
    own: Mapping[int, Sequence[str | Path]] | None = None,
    faults: Mapping[int, Callable[[], None]] | None = None,
) -> list[processes.Running]:
    """``loftq`` with these arguments, and with its ``own``, in each of so many ranks."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
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
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if fault is not None:
        fault()
