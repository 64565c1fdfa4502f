"""Text files, as an option names them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.checkpoint.lfs import refuse_pointer
from loftq_cli.errors import CorruptFileError, InputError, SourceNotFoundError
from loftq_cli.machine.durable import readable


@dataclass(frozen=True)
class Text:
    """A text file: ``content`` decoded, ``sha256`` of its bytes."""

    path: Path
    content: str
    sha256: str


def read_text(option: str, path: Path) -> Text:
    """The text file that ``option`` names. Raises SourceNotFoundError, or InputError if it is
    empty, no UTF-8, or a pointer of git-lfs."""
    refuse_pointer(path)
    try:
        with readable(path):
            raw = path.read_bytes()
    except FileNotFoundError:
        raise SourceNotFoundError(
            f"{option} {path}: no such file", hint="give a text file"
        ) from None
    except OSError as error:
        raise InputError(f"{option} {path}: {error.strerror or error}") from error
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorruptFileError(
            f"{option} {path}: not UTF-8 at byte {error.start}", hint="save it as UTF-8"
        ) from error
    if not content.strip():
        raise InputError(f"{option} {path}: no text in it", hint="give a text file")
    return Text(path, content, hashlib.sha256(raw).hexdigest())
