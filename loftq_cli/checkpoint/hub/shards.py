"""The shards of a model on the hub: headers at once, the rest when it is asked for.

A shard goes into the hub cache, as other tools expect it there, or, if it is not to stay, into
a directory of ours. It is compared with the hub's sha256 before it is used. What was in the cache
before is never deleted.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

from huggingface_hub import close_session

from loftq_cli.checkpoint.header import Header, read_header
from loftq_cli.checkpoint.hub.errors import explained
from loftq_cli.checkpoint.hub.listing import HubSnapshot
from loftq_cli.checkpoint.hub.transfer import download, read_remote_header
from loftq_cli.checkpoint.supply import Progress, Supply
from loftq_cli.errors import CorruptFileError
from loftq_cli.machine.durable import file_sha256

_HEADERS_AT_ONCE = 8


class HubSupply(Supply):
    """The shards of ``snapshot``; in the hub cache, or those that are not there yet in the
    directory ``passing`` until they are released.

    Raises EnvironmentFailure if headers cannot be read.
    """

    def __init__(self, snapshot: HubSnapshot, passing: Path | None = None) -> None:
        super().__init__(snapshot.directory)
        self._snapshot = snapshot
        self._shards = snapshot.shards
        self._passing = None if passing is None else passing / snapshot.revision
        self._cached = {name for name in snapshot.shards if (self.directory / name).is_file()}
        self._lock = threading.Lock()
        self._cleared = False
        with ThreadPoolExecutor(_HEADERS_AT_ONCE, thread_name_prefix="loftq-header") as pool:
            self._headers: dict[str, Future[Header]] = {
                name: pool.submit(self._read_header, name) for name in snapshot.shards
            }

    def path(self, name: str) -> Path:
        if self._passing is None or name in self._cached:
            return self.directory / name
        return self._passing / name

    def has(self, name: str) -> bool:
        return name in self._shards

    def header(self, name: str) -> Header:
        return self._headers[name].result()

    @property
    def missing(self) -> Mapping[str, int]:
        return {
            name: file.size for name, file in self._shards.items() if not self.path(name).is_file()
        }

    @property
    def disk_bytes(self) -> int:
        if self._passing is None:
            return sum(self.missing.values())
        sizes = [file.size for name, file in self._shards.items() if name not in self._cached]
        at_once = max(map(sum, pairwise([*sizes, 0])), default=0)
        # What earlier work left is used, or cleared away first.
        left = sum(path.stat().st_size for path in self._passing.parent.rglob("*"))
        return max(at_once - left, 0)

    def sha256(self, name: str) -> str | None:
        return self._shards[name].sha256

    def is_unchanged(self, name: str, sha256: str, mtime_ns: int) -> bool:
        return self.sha256(name) in (None, sha256)

    def ensure(self, name: str, progress: Progress | None = None) -> None:
        snapshot, path = self._snapshot, self.path(name)
        with self._lock:  # one that was given up may still be coming
            self._clear()
            if path.is_file():
                if self._is_right(name):
                    return
                if name in self._cached:
                    raise CorruptFileError(
                        f"{path} is damaged: its sha256 is not the hub's",
                        hint=f"delete {path.resolve()} and run the command again",
                    )
                path.unlink()  # half of what an earlier run left
            into = None if self._passing is None or name in self._cached else self._passing
            download(snapshot.repo_id, snapshot.revision, name, into=into, progress=progress)
            if not self._is_right(name):
                with explained(snapshot.repo_id, snapshot.revision, name):
                    path.resolve().unlink()  # or the next run would take it for the right one
                    path.unlink(missing_ok=True)
                raise CorruptFileError(
                    f"{name} of {snapshot.repo_id} arrived damaged: its sha256 is not the hub's",
                    hint="it was removed; run the command again",
                )

    def give_up(self) -> None:
        close_session()  # ends a slow download now, and not with its next 10 MB

    def release(self, name: str) -> None:
        if self._passing is not None and name not in self._cached:
            self.path(name).unlink(missing_ok=True)

    def _read_header(self, name: str) -> Header:
        if name in self._cached:
            return read_header(self.path(name))
        snapshot = self._snapshot
        size = self._shards[name].size
        return read_remote_header(snapshot.repo_id, snapshot.revision, name, size)

    def _is_right(self, name: str) -> bool:
        expected, path = self._shards[name], self.path(name)
        with explained(self._snapshot.repo_id, self._snapshot.revision, name):
            if path.stat().st_size != expected.size:
                return False
            return expected.sha256 is None or file_sha256(path) == expected.sha256

    def _clear(self) -> None:
        """Once: remove what earlier runs left of other commits and of unfinished downloads."""
        if self._cleared or self._passing is None:
            return
        self._cleared = True
        shutil.rmtree(self._passing / ".cache", ignore_errors=True)
        if self._passing.parent.is_dir():
            for other in self._passing.parent.iterdir():
                if other != self._passing:
                    shutil.rmtree(other, ignore_errors=True)
