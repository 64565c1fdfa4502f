"""The pages of the documentation, and the tables in them."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

LANGUAGE = "| start | perplexity |"
CLASSIFIER = "| start | residual | bits | rate |"
WORTH = "| bits | method | paper"


def page(name: str) -> str:
    """The text of ``docs/NAME``."""
    return (DOCS / name).read_text("utf-8")


def table(text: str, header: str) -> list[list[str]]:
    """The cells of the one table of ``text`` whose header begins with ``header``, row by row."""
    lines = text.splitlines()
    (first,) = (n for n, line in enumerate(lines) if line.startswith(header))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return rows


def measured(name: str, header: str) -> dict[str, list[str]]:
    """The rows of a table of ``docs/NAME`` by their first cells."""
    return {row[0]: row[1:] for row in table(page(name), header)}
