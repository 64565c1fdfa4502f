"""Where a page is written to: nothing but an earlier page is ever replaced."""

from __future__ import annotations

from pathlib import Path

from loftq_cli.errors import OutputConflictError, UsageError
from loftq_cli.machine.durable import explained, make_directory, write_file
from loftq_cli.machine.packages import required
from loftq_cli.reporting.page.html import GENERATOR

_HEAD = 1000  # bytes, in which a page says what made it


def refuse_target(path: Path) -> None:
    """Raise UsageError if ``path`` cannot be a page, OutputConflictError if it is something else,
    EnvironmentFailure if it cannot be read or the extra [report] is missing: all before any
    work."""
    required("vl_convert", "report", "a report in HTML")
    if path.is_dir():
        raise UsageError(f"--html {path}: a directory", hint="name the file to write")
    with explained(path):
        if not path.exists():
            return
        with path.open("rb") as file:
            ours = GENERATOR.encode() in file.read(_HEAD)
    if not ours:
        raise OutputConflictError(
            f"--html {path}: there is a file of something else", hint="name another file"
        )


def write_page(path: Path, content: str) -> None:
    """Write ``content`` to ``path`` as a whole, and make what is missing above it. Raises
    EnvironmentFailure."""
    with explained(path):
        make_directory(path.absolute().parent)
        write_file(path, content.encode("utf-8", "backslashreplace"))
