"""Pieces of HTML: escaped text, tables, and the one page that holds everything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from loftq_cli.errors import printable
from loftq_cli.machine.packages import required
from loftq_cli.reporting.page.encodings import Figure
from loftq_cli.reporting.page.theme import config

GENERATOR = '<meta name="generator" content="loftq-cli">'
"""In the first lines of every page: what holds it is a report, which may be replaced."""

# Nothing may be fetched. Vega compiles its expressions.
_POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'"


def text(value: object) -> str:
    """``value`` as text of a page."""
    return escape(printable(str(value)))


def table(
    caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, words: int = 1
) -> str:
    """A table whose first column heads its rows; all behind the first ``words`` hold figures."""
    head = "".join(
        f'<th scope="col"{" class=figure" if number >= words else ""}>{text(column)}</th>'
        for number, column in enumerate(columns)
    )
    body = []
    for first, *others in rows:
        cells = "".join(
            f"<td{' class=figure' if number >= words else ''}>{text(cell)}</td>"
            for number, cell in enumerate(others, 1)
        )
        body.append(f'<tr><th scope="row">{text(first)}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table><caption>{text(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def tiles(figures: Sequence[tuple[str, str, str]]) -> str:
    """(what, figure, what else there is to say of it), the figures large."""
    return (
        '<dl class="tiles">'
        + "".join(
            f"<div><dt>{text(what)}</dt>"
            f"<dd><b>{text(figure)}</b> <span>{text(more)}</span></dd></div>"
            for what, figure, more in figures
        )
        + "</dl>"
    )


def section(figure: Figure, more: str = "") -> str:
    """A plot with its heading, and what its reader does not see in words."""
    plot = ""
    if figure.specification is not None:
        label = f'role="img" aria-label="{text(figure.alt)}"'
        plot = f'<div class="plot" id="plot-{figure.name}" {label}></div>'
    said = f'<p class="said">{text(figure.alt)}</p>' if plot else ""
    return (
        f'<section aria-labelledby="{figure.name}"><h2 id="{figure.name}">{text(figure.title)}</h2>'
        f"<p>{text(figure.caption)}</p>{plot}{said}{more}</section>"
    )


def page(
    title: str,
    subtitle: str,
    body: str,
    figures: Sequence[Figure],
    columns: Sequence[str] = (),
    rows: Sequence[Sequence[Any]] = (),
) -> str:
    """The whole page. ``columns`` and ``rows`` are the data set of single matrices, which plots
    know as ``rows``.

    Raises EnvironmentFailure if the extra [report] is missing.
    """
    library = required("vl_convert", "report", "a report in HTML")
    bundle = library.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    plots = {
        figure.name: {**_sized(figure.specification), "config": config()}
        for figure in figures
        if figure.specification is not None
    }
    data = {"columns": list(columns), "rows": list(rows), "plots": plots}
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            GENERATOR,
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{text(title)} · {text(subtitle)}</title>",
            f"<style>{_asset('page.css')}</style>",
            "</head>",
            "<body>",
            f"<header><h1>{text(title)}</h1><p>{text(subtitle)}</p></header>",
            f"<main>{body}</main>",
            f'<script type="application/json" id="data">{_json(data)}</script>',
            f"<script>{_script(bundle)}</script>",
            f"<script>{_script(_asset('page.js'))}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _sized(specification: Mapping[str, Any]) -> dict[str, Any]:
    """With what fits a plot that is as wide as its place into that; its height is the marks'."""
    if specification.get("width") != "container":
        return dict(specification)
    return {**specification, "autosize": {"type": "fit-x", "contains": "padding"}}


def _json(value: Mapping[str, Any]) -> str:
    """JSON that cannot end the element it stands in, whatever a tensor is called."""
    found = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return found.replace("<", "\\u003c")


def _script(source: str) -> str:
    return str(source).replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _asset(name: str) -> str:
    return resources.files("loftq_cli.reporting.page").joinpath(name).read_text("utf-8")
