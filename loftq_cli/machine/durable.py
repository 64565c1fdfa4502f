"""Writing so that a crash at any moment leaves either the old state or the new one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from loftq_cli.errors import EnvironmentFailure

_PIECE = 16 << 20
# What is wrong with a path, whoever reads it and from whatever disk.
_OF_THE_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into an EnvironmentFailure that names ``path``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        hint = "free space or fix the permissions; the same command then resumes"
        if error.errno == errno.ENAMETOOLONG:
            hint = "choose a shorter name for the output"
        raise EnvironmentFailure(f"{error.filename or path}: {reason}", hint=hint) from error


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an OSError of the block that says nothing of the file's contents, such as a lack of
    permission or a failing disk, into an EnvironmentFailure. One of a path that names no file
    stays what it is."""
    try:
        yield
    except OSError as error:
        if error.errno in _OF_THE_PATH:
            raise
        raise EnvironmentFailure(
            f"{path}: {error.strerror or error}",
            hint="check that it may be read, and that its disk is well",
        ) from error


def write_file(path: Path, content: bytes) -> None:
    """Replace ``path`` atomically: temporary file, fsync, rename, fsync of the directory."""
    # A name that nobody else has: what is written, replaced and removed here is ours.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with explained(path):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            try:
                write_all(descriptor, content)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        sync_directory(path.parent)


def copy_file(path: Path, target: Path) -> None:
    """Copy a file of any size to ``target``, durably: a copy, never another name of the same file,
    which whoever writes to one of them would change under both. Disks that can share what two files
    have in common do. Raises EnvironmentFailure."""
    with explained(target):
        target.unlink(missing_ok=True)
        with path.open("rb") as source, target.open("xb") as copy:
            try:
                while os.copy_file_range(source.fileno(), copy.fileno(), 1 << 30):
                    pass
            except (OSError, AttributeError):  # from one disk to another, or on another system
                source.seek(0)
                copy.seek(0)
                copy.truncate()
                shutil.copyfileobj(source, copy, _PIECE)
            copy.flush()
            os.fsync(copy.fileno())


def write_all(descriptor: int, content: bytes | memoryview, offset: int | None = None) -> None:
    """Write every byte, at ``offset`` or appending. Raises OSError."""
    view = memoryview(content).cast("B")
    while view.nbytes:
        if offset is None:
            written = os.write(descriptor, view)
        else:
            written = os.pwrite(descriptor, view, offset)
            offset += written
        view = view[written:]


def make_directory(path: Path) -> None:
    """Create ``path``, and what is missing above it, durably. Raises OSError."""
    missing = list(takewhile(lambda each: not each.exists(), path.parents))
    path.mkdir(parents=True, exist_ok=True)
    # Also if it was there already: whoever made it may have died before this.
    for made in (path, *missing):
        sync_directory(made.parent)


def sync_directory(path: Path) -> None:
    """Make renames and creations in ``path`` durable. Raises OSError."""
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that know no better
            raise


def sync_tree(path: Path) -> None:
    """Make everything in the directory ``path`` durable. Raises OSError."""
    for directory, _, names in os.walk(path, onerror=_raise):
        for name in names:
            _sync(Path(directory, name))
        sync_directory(Path(directory))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise(error: OSError) -> None:
    raise error


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in pieces. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def utc(nanoseconds: int) -> str:
    """An mtime, as messages show it."""
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest:09}Z"


def pretty_json(value: Any, *, in_order: bool = False) -> bytes:
    """UTF-8, two spaces, a final newline; keys sorted. ``in_order``: as a model's own config has
    them, with its NaN and Infinity if it has any; else those, which JSON has not, are a
    ValueError."""
    text = json.dumps(
        value, indent=2, sort_keys=not in_order, ensure_ascii=False, allow_nan=in_order
    )
    text += "\n"
    # What UTF-8 cannot hold, lone surrogates from file names, becomes JSON's own escape.
    return text.encode("utf-8", "backslashreplace")
