"""Where a source's shards are, and how they come to be there.

A conversion is planned from headers alone; a shard is asked for when its tensors are needed, and
given back when nothing more is read from it. In a local directory there is nothing to do for
either; hub_shards.py downloads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.checkpoint.header import Header, read_header

PICKLED = ".bin"
"""The suffix of pickled shards."""

Progress = Callable[[int], None]
"""Gets the number of bytes that arrived since its last call; what it raises ends the download."""


@dataclass(frozen=True)
class Commit:
    """One commit of a hub repository; ``revision`` is its hash."""

    repo_id: str
    revision: str


class Supply:
    """The shards that lie in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, name: str) -> Path:
        """Where the shard ``name`` is, or will be once it is there."""
        return self.directory / name

    def has(self, name: str) -> bool:
        """Whether there is a shard ``name``."""
        return self.path(name).exists()

    def header(self, name: str) -> Header:
        """The checked header of a shard. Raises HeaderError, and OSError if it is missing."""
        if name.endswith(PICKLED):
            from loftq_cli.checkpoint.pickles import reader as pickled  # imports torch

            return pickled.read_header(self.path(name))
        return read_header(self.path(name))

    @property
    def missing(self) -> Mapping[str, int]:
        """Shards that are not on disk yet, with their sizes in bytes."""
        return {}

    @property
    def disk_bytes(self) -> int:
        """How much more disk the shards will take at most, one after the other, the next one
        being brought while one is used."""
        return 0

    def sha256(self, name: str) -> str | None:
        """Of the shard, if that is known without reading it."""
        return None

    def is_unchanged(self, name: str, sha256: str, mtime_ns: int) -> bool:
        """Whether a shard that was read to its end, when it was as old as this, is the same now,
        as far as that can be told without reading it."""
        try:
            return self.path(name).stat().st_mtime_ns == mtime_ns
        except OSError:
            return False

    def ensure(self, name: str, progress: Progress | None = None) -> None:
        """Have the shard at its path, verified. Raises EnvironmentFailure (network, access, disk)
        and CorruptFileError (not what the hub says it is)."""

    def give_up(self) -> None:
        """Nobody waits any more for what :meth:`ensure` is doing in another thread."""

    def release(self, name: str) -> None:
        """Nothing more is read from the shard."""
