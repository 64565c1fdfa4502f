"""A model as somebody asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loftq_cli.checkpoint.supply import Commit


@dataclass(frozen=True)
class Request:
    """``model`` is a path or a hub id; ``revision`` a branch, tag or commit on the hub.
    ``offline``: only what is in the hub cache. ``allow_pickle``: a directory may hold pickled
    weights alone.

    ``pinned`` is the commit to use whatever ``revision`` is by now, that of unfinished work;
    ``passing`` a directory for the hub's shards, to stay until they are released, None for the hub
    cache.
    """

    model: str
    revision: str | None = None
    offline: bool = False
    allow_pickle: bool = False
    pinned: Commit | None = None
    passing: Path | None = None
