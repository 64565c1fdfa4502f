"""What processes that work together have to know of each other: where each is, and whether all
would make the same bytes."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from loftq_cli.errors import EnvironmentFailure
from loftq_cli.version import VERSION

_LONGEST = 200  # characters of a setting's value in a message


def about(settings: Mapping[str, Any], sources: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """This process, with what :func:`refuse` compares; ``sources``: [name, …] of files."""
    import torch

    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "space": _space(),
        "software": {"loftq-cli": VERSION, "torch": torch.__version__},
        "settings": dict(settings),
        "sources": [list(each) for each in sources],
    }


def refuse(rank: int, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise EnvironmentFailure, naming both, if ``rank``, which is :func:`about` ``there``, has
    other software, settings or sources than rank 0, which is about ``here``."""
    found = _differences(there, here)
    if found:
        raise EnvironmentFailure(
            f"rank {rank} (on {there['host']}) and rank 0 (on {here['host']}) would not "
            f"make the same bytes: {'; '.join(found)}",
            hint="have all of them use the same software, the same model and settings, and "
            "one kind of device",
        )


def has_ended(there: Mapping[str, Any]) -> bool:
    """Whether the process of this host that is :func:`about` ``there`` is no more; False of
    another host's."""
    return there["space"] == _space() and not _is_there(there["process"])


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    found = []
    for what in ("software", "settings"):
        first, second = there[what], here[what]
        names = sorted({*first, *second})
        found += [
            f"{name} {_short(first.get(name))} and {_short(second.get(name))}"
            for name in names
            if first.get(name) != second.get(name)
        ]
    sources = {name: rest for name, *rest in there["sources"]}
    found += [f"source file {name}" for name, *rest in here["sources"] if sources.get(name) != rest]
    return found


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def _space() -> str:
    """The host, and the name space in which the numbers of its processes are."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # another system than Linux
        return socket.gethostname()


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
