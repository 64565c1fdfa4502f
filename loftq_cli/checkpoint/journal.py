"""The journal of an unfinished conversion: what it is of, and which tensors are durable.

JSON lines, appended and fsynced after the data they speak of. The first line identifies the
conversion; each further one a source tensor whose outputs are on disk, with their hashes, or a
source shard that was read to its end. Every line carries a hash of itself. A torn last line is a
crash's, and is cut off; a damaged one is passed over, and what it spoke of counts as not done.

Several processes that share the work have a journal each, as no two of them append to one file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from loftq_cli.checkpoint.header import strict_json
from loftq_cli.machine.durable import explained, sync_directory, write_all, write_file

VERSION = 2
_CHECK = b', "check": "'  # the last key of every line: the hash of the line without it
_FIELDS: tuple[dict[str, type | tuple[type, ...]], ...] = (
    {"journal": int, "fingerprint": str, "recipe": dict, "sources": list},
    {"tensor": str, "prefix_sha256": str, "outputs": dict, "record": (dict, type(None))},
    {"tensor": str, "apart": dict, "outputs": dict, "record": (dict, type(None))},
    {"shard": str, "sha256": str, "mtime_ns": int},
)


@dataclass(frozen=True)
class Apart:
    """A tensor that was read without what lies before it in its shard, when that was as old as
    this. ``sha256``: of the tensor's values as they are stored, None if the shard's age has to
    do."""

    mtime_ns: int
    sha256: str | None


@dataclass(frozen=True)
class Unit:
    """A finished source tensor. ``prefix_sha256`` is of the source shard up to the tensor's last
    byte, None if it was read ``apart``; ``outputs`` maps file name to {tensor name: sha256};
    ``record`` is the manifest's entry for a quantized matrix, None for a tensor passed through."""

    tensor: str
    prefix_sha256: str | None
    outputs: Mapping[str, Mapping[str, str]]
    record: dict[str, Any] | None
    apart: Apart | None = None


@dataclass(frozen=True)
class ReadShard:
    """A source shard that was read to its end, when it was as old as this."""

    shard: str
    sha256: str
    mtime_ns: int


@dataclass(frozen=True)
class Subject:
    """What an unfinished conversion is of."""

    fingerprint: str
    recipe: dict[str, Any]
    sources: Sequence[Sequence[Any]]


class Journal:
    """An open journal. ``units`` and ``shards``, by name, are what it held when it was opened, and
    before it the ``others``, which are only read; ``damaged`` is the number of lines that could not
    be believed. What :meth:`add` appends is the caller's to remember."""

    def __init__(self, path: Path, identity: Subject, others: Iterable[Path] = ()) -> None:
        self.path = path
        self.units, self.shards = held_in(others, identity)
        lines, length, self.damaged = _read(path)
        _take(lines[1:], self.units, self.shards)
        with explained(path):
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            with explained(path):
                os.ftruncate(self._file, length)
                os.lseek(self._file, length, os.SEEK_SET)
            if not lines:
                self._append([{"journal": VERSION, **asdict(identity)}])
            with explained(path):
                sync_directory(path.parent)
        except BaseException:
            os.close(self._file)
            raise

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
        self._append([_line(unit) for unit in units])

    def add_shard(self, shard: ReadShard) -> None:
        """Record that a source shard was read to its end."""
        self._append([asdict(shard)])

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        with explained(self.path):
            write_all(self._file, b"".join(_sealed(line) for line in lines))
            os.fsync(self._file)


def begin(path: Path, identity: Subject) -> None:
    """Put a journal that holds nothing yet at ``path``, in one step, as others may do the same."""
    write_file(path, _sealed({"journal": VERSION, **asdict(identity)}))


def held_in(
    paths: Iterable[Path], identity: Subject
) -> tuple[dict[str, Unit], dict[str, ReadShard]]:
    """What the journals at ``paths`` say is finished of the conversion ``identity``, by name. They
    may be written meanwhile. Raises EnvironmentFailure if one cannot be read."""
    units: dict[str, Unit] = {}
    shards: dict[str, ReadShard] = {}
    for path in paths:
        lines, _, _ = _read(path)
        if lines and lines[0]["fingerprint"] == identity.fingerprint:
            _take(lines[1:], units, shards)
    return units, shards


def _take(
    lines: Iterable[dict[str, Any]], units: dict[str, Unit], shards: dict[str, ReadShard]
) -> None:
    for line in lines:
        if "shard" in line:
            shards[line["shard"]] = ReadShard(**line)
        elif "apart" in line:
            values = {**line, "prefix_sha256": None, "apart": Apart(**line["apart"])}
            units[line["tensor"]] = Unit(**values)
        else:
            units[line["tensor"]] = Unit(**line)


def _line(unit: Unit) -> dict[str, Any]:
    values = asdict(unit)
    del values["prefix_sha256" if unit.apart else "apart"]
    return values


def subject_in(path: Path) -> Subject | None:
    """The subject in the journal at ``path``; None if there is none, or none to believe.
    Raises EnvironmentFailure if it cannot be read."""
    lines, _, _ = _read(path)
    if not lines:
        return None
    return Subject(lines[0]["fingerprint"], lines[0]["recipe"], lines[0]["sources"])


def is_damaged(path: Path) -> bool:
    """Whether there is a journal that does not say what it is of, though it once did: damaged, or
    another version's. Raises EnvironmentFailure if it cannot be read."""
    lines, _, damaged = _read(path)
    return not lines and damaged > 0


def _sealed(line: Mapping[str, Any]) -> bytes:
    body = json.dumps(line).encode()
    return body[:-1] + _CHECK + _digest(body) + b'"}\n'


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:32].encode()


def _opened(line: bytes) -> dict[str, Any] | None:
    """What a line, without its end, says; None if it is damaged."""
    head, _, tail = line.rpartition(_CHECK)
    body = head + b"}"
    if tail != _digest(body) + b'"}':
        return None
    try:
        value = strict_json(body)
    except ValueError:
        return None
    return value if isinstance(value, dict) and _is_known(value) else None


def _is_known(value: dict[str, Any]) -> bool:
    """Whether these are the fields of one kind of line, with values of their types."""
    for fields in _FIELDS:
        if set(value) == set(fields):
            outputs = value.get("outputs", {})
            return (
                all(isinstance(value[name], kind) for name, kind in fields.items())
                and all(isinstance(digests, dict) for digests in outputs.values())
                and _is_apart(value.get("apart", {"mtime_ns": 0, "sha256": None}))
            )
    return False


def _is_apart(value: dict[str, Any]) -> bool:
    return (
        set(value) == {"mtime_ns", "sha256"}
        and type(value["mtime_ns"]) is int
        and isinstance(value["sha256"], (str, type(None)))
    )


def _read(path: Path) -> tuple[list[dict[str, Any]], int, int]:
    """What the whole lines say, from the one that identifies the conversion on; the length in bytes
    up to the last of them; and how many lines before that are damaged. Without a first line that
    is whole nothing else can be believed."""
    with explained(path):
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return [], 0, 0
    lines: list[dict[str, Any]] = []
    position = length = passed = damaged = 0
    for line in raw.split(b"\n")[:-1]:
        position += len(line) + 1
        value = _opened(line)
        if not lines and (value is None or value.get("journal") != VERSION):
            return [], 0, 1
        if value is None or (lines and "journal" in value):
            passed += 1
        else:
            lines.append(value)
            length, damaged = position, damaged + passed
            passed = 0
    return lines, length, damaged
