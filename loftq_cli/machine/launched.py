"""Which of several processes this is that torchrun, accelerate or srun started for one run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from loftq_cli.errors import UsageError

_COMMON = ("MASTER_ADDR", "MASTER_PORT")
_PORTS = range(20_000, 30_000)  # outside of those that Linux hands out by itself


@dataclass(frozen=True)
class Place:
    """``rank`` of ``size`` processes, ``local_rank`` of the ``local_size`` on this host, and the
    ``address`` and ``port`` where they meet. ``served``: there is a store already, torchrun's."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    served: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Where this process stands among several; None if it is alone.

    RANK and WORLD_SIZE say so, as torchrun and accelerate set them, or what srun gives the tasks of
    a step. The batch script of a Slurm job is no such task, and neither is what mpirun starts.
    Raises UsageError if the variables contradict each other.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _of_torch(environment)
    if "SLURM_STEP_NUM_TASKS" in environment and "OMPI_COMM_WORLD_RANK" not in environment:
        return _of_slurm(environment)
    return None


def local(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(number, count) of this process among those of its run that are on this host."""
    found = place(environment)
    return (0, 1) if found is None else (found.local_rank, found.local_size)


def beside(device: str) -> int:
    """How many processes of this run share the memory of a ``device`` of this kind."""
    return local()[1] if device == "cpu" else 1


def _of_torch(environment: Mapping[str, str]) -> Place | None:
    size = _number(environment, "WORLD_SIZE")
    if size < 2:
        return None
    missing = [name for name in _COMMON if name not in environment]
    if missing:
        raise UsageError(
            f"WORLD_SIZE={size} says that this is one of several processes, and "
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set",
            hint="start them with torchrun, or unset RANK and WORLD_SIZE",
        )
    rank = _number(environment, "RANK")
    return _checked(
        Place(
            rank,
            size,
            _number(environment, "LOCAL_RANK", 0),
            _number(environment, "LOCAL_WORLD_SIZE", 1),
            environment["MASTER_ADDR"],
            _number(environment, "MASTER_PORT"),
            environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    )


def _of_slurm(environment: Mapping[str, str]) -> Place | None:
    size = _number(environment, "SLURM_STEP_NUM_TASKS")
    if size < 2:
        return None
    job, step = (_number(environment, name, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    # Steps of one job may run side by side, and jobs share hosts.
    port = _PORTS.start + (job * 31 + step) % len(_PORTS)
    nodes = _number(environment, "SLURM_STEP_NUM_NODES", 1)
    listed = environment.get("SLURM_STEP_NODELIST", "")
    return _checked(
        Place(
            _number(environment, "SLURM_PROCID"),
            size,
            _number(environment, "SLURM_LOCALID", 0),
            _tasks_here(environment.get("SLURM_STEP_TASKS_PER_NODE", ""), environment, size),
            environment.get("MASTER_ADDR", "127.0.0.1" if nodes == 1 else _first_host(listed)),
            _number(environment, "MASTER_PORT", port),
        )
    )


def _first_host(nodes: str) -> str:
    """The first name of a list of Slurm's, such as ``gpu[03-05,9],login``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise UsageError(
            f"SLURM_STEP_NODELIST {nodes!r} names no host",
            hint="export MASTER_ADDR, the host of task 0",
        )
    return "".join(part or "" for part in match.groups())


def _tasks_here(listed: str, environment: Mapping[str, str], size: int) -> int:
    """Of a list such as ``4(x2),3``, the entry of this node."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", listed):
        counts += [int(count)] * int(times or 1)
    node = _number(environment, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else size


def _checked(found: Place) -> Place:
    if not (0 <= found.rank < found.size and 0 < found.port < 65_536):
        raise UsageError(
            f"rank {found.rank} of {found.size} at port {found.port}: no such place",
            hint="start the processes with torchrun or srun",
        )
    return found


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name)
    if value is None and default is not None:
        return default
    try:
        return int(value or "")
    except ValueError:
        raise UsageError(
            f"{name}={value!r} is not a number",
            hint="start the processes with torchrun or srun",
        ) from None
