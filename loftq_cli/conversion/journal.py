"""The journal of an unfinished conversion: what it is of, and which tensors are durable.

JSON lines, appended and fsynced after the data they speak of. The first line identifies the
conversion; each further one a source tensor whose outputs are on disk, with their hashes, or a
source shard that was read to its end. A torn last line is a crash's, and is cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from loftq_cli.checkpoint.durable import explained, sync_directory, write_all

VERSION = 1


@dataclass(frozen=True)
class Unit:
    """A finished source tensor. ``prefix_sha256`` is of the source shard up to the tensor's last
    byte; ``outputs`` maps file name to {tensor name: sha256}; ``record`` is the manifest's entry
    for a quantized matrix, None for a tensor passed through."""

    tensor: str
    prefix_sha256: str
    outputs: Mapping[str, Mapping[str, str]]
    record: dict[str, Any] | None


@dataclass(frozen=True)
class Identity:
    """What an unfinished conversion is of."""

    fingerprint: str
    recipe: dict[str, Any]
    sources: Sequence[Sequence[Any]]


class Journal:
    """An open journal. ``units`` and ``shards`` ({source shard: sha256}) are what it held when it
    was opened; what :meth:`add` appends is the caller's to remember."""

    def __init__(self, path: Path, identity: Identity) -> None:
        self.path = path
        self.units: dict[str, Unit] = {}
        self.shards: dict[str, str] = {}
        lines, length = _complete_lines(path)
        for line in lines[1:]:
            if "shard" in line:
                self.shards[line["shard"]] = line["sha256"]
            else:
                unit = Unit(line["tensor"], line["prefix_sha256"], line["outputs"], line["record"])
                self.units[unit.tensor] = unit
        with explained(path):
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            os.ftruncate(self._file, length)
            os.lseek(self._file, length, os.SEEK_SET)
        if not lines:
            self._append(
                [
                    {
                        "journal": VERSION,
                        "fingerprint": identity.fingerprint,
                        "recipe": identity.recipe,
                        "sources": identity.sources,
                    }
                ]
            )
            with explained(path):
                sync_directory(path.parent)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)

    def add(self, units: Sequence[Unit]) -> None:
        """Record units whose outputs are durable."""
        self._append(
            [
                {
                    "tensor": unit.tensor,
                    "prefix_sha256": unit.prefix_sha256,
                    "outputs": unit.outputs,
                    "record": unit.record,
                }
                for unit in units
            ]
        )

    def add_shard(self, name: str, sha256: str) -> None:
        """Record that a source shard was read to its end."""
        self._append([{"shard": name, "sha256": sha256}])

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with explained(self.path):
            write_all(self._file, text.encode())
            os.fsync(self._file)


def identify(path: Path) -> Identity | None:
    """The identity in the journal at ``path``; None where there is no whole first line."""
    lines, _ = _complete_lines(path)
    if not lines:
        return None
    return Identity(lines[0]["fingerprint"], lines[0]["recipe"], lines[0]["sources"])


def _complete_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Parsed lines up to the first that is torn, and their length in bytes."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    lines: list[dict[str, Any]] = []
    length = 0
    for line in raw.splitlines(keepends=True):
        try:
            value = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(value, dict):
            break
        expected = "fingerprint" if not lines else ("shard" if "shard" in value else "tensor")
        if expected not in value:
            break
        if not lines and value.get("journal") != VERSION:
            break
        lines.append(value)
        length += len(line)
    return lines, length
