"""Pointers of git-lfs: small text files where a clone without git-lfs has no large ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from loftq_cli.errors import CorruptFileError, listed

_FIRST_LINE = b"version https://git-lfs.github.com/spec/v1"
_LARGEST = 1024  # bytes, by git-lfs's own specification
_WHAT = "of git-lfs, not the contents"
_HINT = "run `git lfs pull` in the directory, or get its files with `hf download`"


def is_pointer(path: Path) -> bool:
    """Whether the file at ``path`` is a pointer, False if it cannot be read."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return False
        with path.open("rb") as file:
            return file.read(len(_FIRST_LINE)) == _FIRST_LINE
    except OSError:
        return False


def refuse_pointer(path: Path) -> None:
    """Raise CorruptFileError if the file at ``path`` is a pointer."""
    if is_pointer(path):
        raise CorruptFileError(f"{path} is a pointer {_WHAT}", hint=_HINT)


def refuse_pointers(directory: Path, names: Iterable[str]) -> None:
    """Raise CorruptFileError, which lists them, if files of these ``names`` in ``directory`` are
    pointers."""
    found = sorted({name for name in names if is_pointer(directory / name)})
    if found:
        what = "are pointers" if len(found) > 1 else "is a pointer"
        raise CorruptFileError(f"{directory}: {listed(found)} {what} {_WHAT}", hint=_HINT)
