"""Paths as they are typed."""

from __future__ import annotations

import os
from pathlib import Path

from loftq_cli.errors import UsageError


def expanded(path: str | os.PathLike[str]) -> Path:
    """``path`` with a home directory in the place of a leading ``~`` or ``~user``; what is really
    named so is given as ``./~``. Raises UsageError if there is no such user."""
    text = os.fspath(path)
    found = os.path.expanduser(text)
    if text.startswith("~") and found == text and not os.path.lexists(text):
        home = text.partition("/")[0]
        raise UsageError(
            f"{text}: there is no home directory {home}",
            hint=f"a path whose name begins with ~ is given as ./{text}",
        )
    return Path(found)


def check_output_path(output: Path, source: Path) -> Path:
    """The real path of ``output``. Raises UsageError if it is the source directory, lies inside
    it or around it, or cannot be resolved."""
    real_output, real_source = real_path(output), source.resolve()
    inside = real_output == real_source or real_source in real_output.parents
    if inside or real_output in real_source.parents:
        how = "is inside the input" if inside else "contains the input"
        raise UsageError(f"--output {output} {how} {source}", hint="choose a directory outside it")
    return real_output


def real_path(output: Path) -> Path:
    """``output`` without links. Raises UsageError if it cannot be resolved."""
    try:
        return output.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise UsageError(f"--output {output}: {error}", hint="choose another") from error
