"""JSON files that are read whole: config, index, modules, tokenizer."""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.header import strict_json
from loftq_cli.checkpoint.lfs import refuse_pointer
from loftq_cli.errors import CorruptFileError, SourceNotFoundError
from loftq_cli.machine.durable import readable

_MAX_BYTES = 100_000_000


@dataclass(frozen=True)
class SmallFile:
    """A JSON file that was read whole."""

    name: str
    size: int
    sha256: str
    content: dict[str, Any]


def read_json(path: Path) -> SmallFile:
    """A JSON object from a file. Raises SourceNotFoundError, CorruptFileError, and
    EnvironmentFailure if the file may not or cannot be read."""
    refuse_pointer(path)
    try:
        with readable(path):
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise CorruptFileError(f"{path}: not a regular file")
            if status.st_size > _MAX_BYTES:
                raise CorruptFileError(f"{path}: larger than 100 MB")
            raw = path.read_bytes()
    except FileNotFoundError:
        raise SourceNotFoundError(
            f"{path}: missing", hint="a checkpoint directory needs its config.json"
        ) from None
    except OSError as error:
        raise CorruptFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        content = strict_json(raw)
    except ValueError as error:
        raise CorruptFileError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CorruptFileError(f"{path}: not a JSON object")
    return SmallFile(path.name, len(raw), hashlib.sha256(raw).hexdigest(), content)
