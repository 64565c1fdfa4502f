"""What was found about starts, in the tables of README.md and docs that have starts for rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PAGES = (
    "docs/results/language-model.md",
    "docs/statistics.md",
    "docs/choosing.md",
    "README.md",
)
NONE = "\u2013"
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")

Row = Mapping[str, str]
"""The cells of a start by the heading of their column."""


def row(before: Mapping[str, Any], after: list[dict[str, Any]]) -> Row:
    """Of what was found ``before`` training, and ``after`` it at some rates, of which the best
    counts."""
    best = min(after, key=lambda result: result["perplexity"], default=None)
    perplexity = plain(before["perplexity"])
    return {
        "perplexity": perplexity,
        "before training": perplexity,
        "KL": f"{before['divergence']:.2f}",
        "top-1": f"{before['agreement']:.1%}",
        "Brown": plain(before["brown"]["perplexity"]),
        "its KL": f"{before['brown']['divergence']:.2f}",
        "plain residual": f"{before['plain']:.3f}",
        "weighted residual": f"{before['weighted']:.3f}",
        "bits": f"{before['bits']:.2f}",
        "with adapter": f"{before['bits'] + before['adapter_bits']:.2f}",
        "seconds": f"{before['seconds']:,.0f}",
        "GB": f"{before['gigabytes']:.1f}",
        "after 44 steps": plain(best["perplexity"]) if best else NONE,
        "rate": f"{best['rate']:g}" if best else NONE,
    }


def plain(perplexity: float) -> str:
    """As people read it: 51.9, 4,076, 1.9 · 10⁹."""
    if perplexity < 1000:
        return f"{perplexity:.1f}"
    if perplexity < 1e7:
        return f"{perplexity:,.0f}"
    digits, _, power = f"{perplexity:.1e}".partition("e+")
    return f"{digits} \u00b7 10{power.lstrip('0').translate(_RAISED)}"


def write(rows: Mapping[str, Row]) -> None:
    """Put ``rows``, by start, into the pages."""
    for name in PAGES:
        page = ROOT / name
        page.write_text(rewritten(page.read_text("utf-8"), rows), "utf-8")


def rewritten(page: str, rows: Mapping[str, Row]) -> str:
    """``page`` with the cells of ``rows`` under the headings that they have; others stay."""
    lines, headings = [], list[str]()
    for line in page.split("\n"):
        cells = [cell.strip() for cell in line.strip("| ").split("|")] if line[:1] == "|" else []
        if not cells:
            headings = []
        elif not headings:
            headings = cells
        elif cells[0] in rows:
            known = rows[cells[0]]
            pairs = zip(headings, cells, strict=True)
            cells = [known.get(heading, cell) for heading, cell in pairs]
            line = f"| {' | '.join(cells)} |"
        lines.append(line)
    return "\n".join(lines)
