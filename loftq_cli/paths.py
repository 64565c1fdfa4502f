"""Paths as they are typed."""

from __future__ import annotations

import os
from pathlib import Path

from loftq_cli.errors import UsageError


def expanded(path: str | os.PathLike[str]) -> Path:
    """``path`` with a home directory in the place of a leading ``~`` or ``~user``; what is really
    named so is given as ``./~``. Raises UsageError where there is no such user."""
    text = os.fspath(path)
    found = os.path.expanduser(text)
    if text.startswith("~") and found == text and not os.path.lexists(text):
        home = text.partition("/")[0]
        raise UsageError(
            f"{text}: there is no home directory {home}",
            hint=f"a path whose name begins with ~ is given as ./{text}",
        )
    return Path(found)
