"""The only module that prints: results on stdout, everything else on stderr.

Bars are narrator.py's, which sends its lines through here. rich is imported where it is used, so
that ``loftq --help`` stays quick.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from loftq_cli.errors import EnvironmentFailure, printable
from loftq_cli.machine import streams
from loftq_cli.settings.sizes import decimal

if TYPE_CHECKING:
    from rich.table import Table

_PIPE_WIDTH = 200  # columns if stdout is not a terminal: names are not to be cut


_log: TextIO | None = None
_name = "loftq"


def called(name: str) -> None:
    """Begin lines on stderr with ``name``: one of several processes says which it is."""
    global _name
    _name = name


def log_to(path: Path | None) -> None:
    """Append what is complained of, and what :func:`log` gets, to the file ``path`` from now on;
    None: to none. Raises EnvironmentFailure if it cannot be opened."""
    global _log
    if _log is not None:
        _log.close()
        _log = None
    if path is not None:
        try:
            _log = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        except OSError as error:
            raise EnvironmentFailure(
                f"--log-file {path}: {error.strerror}", hint="name a file that can be written"
            ) from error


def log(text: str) -> None:
    """One line, with the time, in the log if there is one. A log that is full is no error."""
    global _log
    if _log is not None:
        try:
            _log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(text)}\n")
        except OSError:
            _log = None


def complain(text: str) -> None:
    """One line on stderr. If nobody reads it any more, work goes on all the same."""
    log(text)
    try:
        print(f"{_name}: {printable(text)}", file=sys.stderr)
    except OSError:
        streams.drop(sys.stderr)


def json_object(value: Mapping[str, Any]) -> None:
    """A JSON object on stdout, keys sorted."""
    _print(json.dumps(value, indent=2, sort_keys=True))


def csv_rows(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """CSV on stdout."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    _print(text.getvalue(), end="")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; the first column is left-aligned, the others are numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made: Table = Table(title=title, title_justify="left", title_style="bold", box=None)
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(clean(cell)) for cell in row))
    console = Console(file=streams.answers(), width=width(), highlight=False)
    with console.capture() as text:  # rich would exit with 1 if the reader has gone
        console.print(made)
    _print(text.get(), end="")


def compact_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose columns are as narrow as their cells, or, if the terminal is narrower still, a
    list: the first column's cells, and below each the others'."""
    cells = [columns, *([clean(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    paragraph(title)
    room = (width() - sum(widths)) // max(len(widths) - 1, 1)
    if room >= 1:
        for row in cells:
            aligned = [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
            _print((" " * min(room, 2)).join([row[0].ljust(widths[0]), *aligned]).rstrip())
        return
    for row in cells[1:]:
        paragraph(row[0])
        told = [f"{name} {cell}" for name, cell in zip(columns[1:], row[1:], strict=True) if cell]
        paragraph("  " + ", ".join(told), hanging=2)


def pairs(title: str, labelled: Sequence[tuple[str, str]]) -> None:
    """Labelled values on stdout, one a line, or as many lines as a narrow terminal needs."""
    widest = max(len(label) for label, _ in labelled)
    paragraph(title)
    for label, value in labelled:
        paragraph(
            f"  {label.ljust(widest)}  {printable(value)}", hanging=min(widest + 4, width() // 2)
        )


def paragraph(text: str, hanging: int = 0) -> None:
    """A line on stdout, broken at spaces if the terminal is narrower; what has none is kept whole.
    A first character of a new line is kept."""
    first, text = ("\n", text[1:]) if text.startswith("\n") else ("", text)
    text = clean(text)
    if streams.answers().isatty() and len(text) > width():
        text = textwrap.fill(
            text,
            max(width(), hanging + 1),
            subsequent_indent=" " * hanging,
            break_long_words=False,
            break_on_hyphens=False,
        )
    _print(first + text)


def width() -> int:
    """Columns that there are on stdout."""
    return shutil.get_terminal_size().columns if streams.answers().isatty() else _PIPE_WIDTH


def shows(text: str) -> bool:
    """Whether stdout shows the characters of ``text``."""
    if streams.answers().isatty() and os.environ.get("TERM") in ("dumb", "linux"):
        return False
    return streams.showable(text, streams.answers()) == text


def clean(text: str) -> str:
    """``text`` as stdout can show it, and without characters that drive a terminal."""
    return streams.showable(printable(text), streams.answers())


def size(nbytes: float) -> str:
    """Bytes in decimal units, as disks are sold."""
    return decimal(nbytes)


def line(text: str = "") -> None:
    """A line on stdout."""
    _print(text)


def _print(text: str, end: str = "\n") -> None:
    print(text, end=end, file=streams.answers())


def shape(sides: Sequence[int]) -> str:
    """A tensor's shape for a table."""
    return " x ".join(str(side) for side in sides) or "scalar"
