"""What a loss of power may leave of a directory: each unsynced change kept, lost or torn.

The model: a file's contents are safe once the file was synced, and a name (made, removed or moved)
once its directory was. Until then each change is on its own, whatever came before or after it; a
write may also be there in part. That is harsher than file systems are, which keep changes of names
in order.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.whole.crash.operations import Operation

_SECTOR = 512


@dataclass(eq=False)
class Node:
    """A file or directory, whatever its name is; ``names`` and ``content`` as they are at first."""

    is_directory: bool
    names: dict[str, Node] = field(default_factory=dict)
    content: bytes = b""


@dataclass(frozen=True)
class Change:
    """One thing that happened: ``kind`` link, unlink, move, write, truncate or sync, to ``node``;
    ``home`` and ``target`` are (directory, name)."""

    kind: str
    node: Node
    home: tuple[Node, str] | None = None
    target: tuple[Node, str] | None = None
    offset: int = 0
    content: bytes = b""

    def is_made_safe_by(self, sync: Node) -> bool:
        if self.kind in ("write", "truncate"):
            return sync is self.node
        return any(place is not None and sync is place[0] for place in (self.home, self.target))


class Disk:
    """Act: does every operation on ``root`` and remembers it."""

    def __init__(self, root: Path) -> None:
        self._root = os.path.realpath(root)
        self._tree = _snapshot(Path(root))
        self._now = dict(_walk(self._root, self._tree))
        self.changes: list[Change] = []

    def __call__(self, operation: Operation) -> Any:
        offset = 0
        if operation.name == "write":
            offset = os.lseek(operation.arguments[0], 0, os.SEEK_CUR)
        fresh = not os.path.lexists(operation.path)
        result = operation()
        if operation.changes:
            self._remember(operation, result, offset, fresh)
        return result

    def _remember(self, operation: Operation, result: Any, offset: int, fresh: bool) -> None:
        name, path, arguments = operation.name, operation.path, operation.arguments
        if name in ("open", "mkdir"):
            if fresh:
                node = self._now[path] = Node(name == "mkdir")
                self._add("link", node, home=self._place(path))
            elif name == "open" and arguments[1] & os.O_TRUNC:
                self._add("truncate", self._now[path])
        elif name in ("unlink", "rmdir"):
            self._add("unlink", self._now.pop(path), home=self._place(path))
        elif name in ("rename", "replace"):
            node = self._now[path]
            self._add("move", node, home=self._place(path), target=self._place(operation.target))
            moved = {
                operation.target + each.removeprefix(path): self._now.pop(each)
                for each in list(self._now)
                if each == path or each.startswith(path + os.sep)
            }
            self._now.update(moved)
        elif name == "fsync":
            self._add("sync", self._now[path])
        elif name == "ftruncate":
            self._add("truncate", self._now[path], offset=arguments[1])
        else:
            if name == "pwrite":
                offset = arguments[2]
            content = bytes(arguments[1])[:result]
            self._add("write", self._now[path], offset=offset, content=content)

    def _add(self, kind: str, node: Node, **details: Any) -> None:
        self.changes.append(Change(kind, node, **details))

    def _place(self, path: str) -> tuple[Node, str]:
        return self._now[os.path.dirname(path)], os.path.basename(path)

    def leave(self, target: Path, chance: random.Random, count: int | None = None) -> None:
        """Make in ``target`` what a loss of power after the first ``count`` changes leaves."""
        changes = self.changes[:count]
        names: dict[Node, dict[str, Node]] = {}
        contents: dict[Node, bytearray] = {}
        for _, node in _walk("", self._tree):
            names[node], contents[node] = dict(node.names), bytearray(node.content)
        kept = chance.choice((0.0, 0.5, 0.5, 1.0))  # none, all, or some of what was not synced
        safe = _safe(changes)
        for number, change in enumerate(changes):
            if number not in safe and chance.random() >= kept:
                if change.kind != "write" or chance.random() < 0.5:
                    continue
                change = _torn(change, chance)
            _apply(change, names, contents)
        target.mkdir()
        _write(self._tree, target, names, contents)


def _safe(changes: Sequence[Change]) -> set[int]:
    """The positions of changes that a later sync made safe."""
    synced: set[Node] = set()
    safe = set()
    for number in reversed(range(len(changes))):
        change = changes[number]
        if change.kind == "sync":
            synced.add(change.node)
        elif any(change.is_made_safe_by(node) for node in synced):
            safe.add(number)
    return safe


def _torn(change: Change, chance: random.Random) -> Change:
    """A write of which some sectors arrived; what is missing in between stays what it was."""
    start = chance.randrange(len(change.content) + 1)
    end = min(start + chance.choice((1, 7, _SECTOR, 4096)), len(change.content))
    if chance.random() < 0.5:
        start = 0
    content = change.content[start:end]
    return Change("write", change.node, offset=change.offset + start, content=content)


def _apply(
    change: Change, names: dict[Node, dict[str, Node]], contents: dict[Node, bytearray]
) -> None:
    node = change.node
    if change.kind == "link":
        directory, name = _set(change.home)
        names.setdefault(directory, {})[name] = node
    elif change.kind in ("unlink", "move"):
        directory, name = _set(change.home)
        if names.setdefault(directory, {}).get(name) is node:
            del names[directory][name]
        if change.kind == "move":
            directory, name = _set(change.target)
            names.setdefault(directory, {})[name] = node
    elif change.kind == "truncate":
        content = contents.setdefault(node, bytearray())
        del content[change.offset :]
        content.extend(bytes(change.offset - len(content)))
    elif change.kind == "write":
        content = contents.setdefault(node, bytearray())
        content.extend(bytes(max(0, change.offset - len(content))))
        content[change.offset : change.offset + len(change.content)] = change.content


def _set(place: tuple[Node, str] | None) -> tuple[Node, str]:
    assert place is not None
    return place


def _write(
    node: Node,
    path: Path,
    names: dict[Node, dict[str, Node]],
    contents: dict[Node, bytearray],
) -> None:
    for name, child in names.get(node, {}).items():
        if child.is_directory:
            (path / name).mkdir()
            _write(child, path / name, names, contents)
        else:
            (path / name).write_bytes(contents.get(child, b""))


def _snapshot(path: Path) -> Node:
    if path.is_dir():
        return Node(True, {each.name: _snapshot(each) for each in path.iterdir()})
    return Node(False, content=path.read_bytes())


def _walk(path: str, node: Node) -> Iterator[tuple[str, Node]]:
    yield path, node
    for name, child in node.names.items():
        yield from _walk(os.path.join(path, name), child)
