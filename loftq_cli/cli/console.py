"""The only module that prints: results on stdout, everything else on stderr.

Bars are narrator.py's, which sends its lines through here. rich is imported where it is used, so
that ``loftq --help`` stays quick.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import printable
from loftq_cli.machine import streams

if TYPE_CHECKING:
    from rich.table import Table

_PIPE_WIDTH = 200  # columns if stdout is not a terminal: names are not to be cut


def complain(text: str) -> None:
    """One line on stderr. If nobody reads it any more, work goes on all the same."""
    try:
        print(f"loftq: {printable(text)}", file=sys.stderr)
    except OSError:
        streams.drop(sys.stderr)


def json_object(value: Mapping[str, Any]) -> None:
    """A JSON object on stdout, keys sorted."""
    print(json.dumps(value, indent=2, sort_keys=True))


def csv_rows(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """CSV on stdout."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    print(text.getvalue(), end="")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; the first column is left-aligned, the others are numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made: Table = Table(title=title, title_justify="left", title_style="bold", box=None)
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(streams.showable(printable(cell), sys.stdout)) for cell in row))
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    console = Console(width=width, highlight=False)
    with console.capture() as text:  # rich would exit with 1 if the reader has gone
        console.print(made)
    print(text.get(), end="")


def pairs(title: str, labelled: Sequence[tuple[str, str]]) -> None:
    """Labelled values on stdout, one a line."""
    width = max(len(label) for label, _ in labelled)
    print(printable(title))
    for label, value in labelled:
        print(f"  {label.ljust(width)}  {printable(value)}")


def size(nbytes: float) -> str:
    """Bytes in decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    raise AssertionError


def line(text: str = "") -> None:
    """A line on stdout."""
    print(text)


def shape(sides: Sequence[int]) -> str:
    """A tensor's shape for a table."""
    return " x ".join(str(side) for side in sides) or "scalar"
