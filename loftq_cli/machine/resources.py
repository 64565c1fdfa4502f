"""Space, memory and permissions: what a command needs of the machine, checked before it writes."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from loftq_cli.errors import EnvironmentFailure
from loftq_cli.machine.durable import explained

_CGROUPS = Path("/sys/fs/cgroup")


def check_space(directory: Path, needed: int, hint: str | None = None) -> None:
    """Raise EnvironmentFailure if the disk of ``directory`` (or of its nearest existing parent)
    lacks ``needed`` bytes, or files in it cannot be made, renamed and made durable. ``hint`` is
    for a disk that is too small."""
    existing = directory
    while not os.path.exists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise EnvironmentFailure(f"{existing}: not a directory", hint="choose another --output")
    check_permissions(existing)
    with explained(directory):
        free = shutil.disk_usage(existing).free
    if free < needed:
        raise EnvironmentFailure(
            f"{directory}: {_size(needed)} needed, {_size(free)} free",
            hint=hint or "free space or choose an --output on another disk",
        )


def check_permissions(directory: Path) -> None:
    """Raise EnvironmentFailure if an existing directory is not ours to change and to sync."""
    allowed = os.access(directory, os.R_OK | os.W_OK | os.X_OK)
    if not allowed and directory.is_dir():  # else it was published or discarded just now
        raise EnvironmentFailure(
            f"{directory}: not writable", hint="fix its permissions, or choose another place"
        )


def check_memory(
    needed: int,
    what: str,
    device: torch.device,
    *,
    hint: str = "free memory, or pass the tensor through with --exclude",
) -> None:
    """Raise EnvironmentFailure if fewer than ``needed`` bytes of memory can be had for ``what``
    on ``device``."""
    available = available_memory(device)
    if available is not None and available < needed:
        raise EnvironmentFailure(
            f"{what}: {_size(needed)} of memory needed, {_size(available)} available ({device})",
            hint=hint,
        )


def available_memory(device: torch.device, *, swap: bool = True) -> int | None:
    """Bytes of memory that this process can still get on ``device``. On the host: of the machine,
    with its ``swap`` or without, of its control groups and of its own limit. None if nothing
    says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [_of_machine(swap), *_of_groups(), _of_limit()]
    return min((size for size in found if size is not None), default=None)


def _of_machine(swap: bool) -> int | None:
    values = _values(Path("/proc/meminfo"))
    if "MemAvailable:" not in values:
        return None
    return (values["MemAvailable:"] + (values.get("SwapFree:", 0) if swap else 0)) * 1024


def _of_groups() -> Iterator[int]:
    """What the limits leave of the control groups, of either version, that this process is in."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            root, limit, usage, cache = _CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif kinds == "memory":
            root = _CGROUPS / "memory"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        group = root / path.lstrip("/")
        # The group itself and those around it; in a container only the root may be visible.
        for directory in (group, *group.parents):
            with suppress(OSError, ValueError):  # no limit: no file, or "max"
                most = int((directory / limit).read_text())
                used = int((directory / usage).read_text())
                reclaimable = _values(directory / "memory.stat").get(cache, 0)
                yield max(0, most - used + reclaimable)
            if directory == root:
                break


def _of_limit() -> int | None:
    """What RLIMIT_AS leaves."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    size = _values(Path("/proc/self/status")).get("VmSize:")
    return None if size is None else max(0, limit - size * 1024)


def _values(path: Path) -> dict[str, int]:
    """The lines ``name number`` of a file of the system's; none if it cannot be read."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**8 else f"{nbytes / 1e6:.2f} MB"


@contextmanager
def memory_explained(what: str, *, hint: str, device: torch.device | None = None) -> Iterator[None]:
    """Turn running out of memory into an EnvironmentFailure that says for ``what``."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EnvironmentFailure(
            f"{what}: {device or 'the device'} is out of memory",
            hint="use --device cpu, or free the device",
        ) from error
    except (MemoryError, RuntimeError) as error:
        # torch's CPU allocator raises a plain RuntimeError.
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        raise EnvironmentFailure(f"{what}: out of memory", hint=hint) from error
