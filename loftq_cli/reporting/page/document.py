"""``loftq error-report --html``: the report on one conversion, as one HTML file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loftq_cli.checkpoint.output import Output
from loftq_cli.reporting import summary
from loftq_cli.reporting.page import figures, html
from loftq_cli.reporting.page.curves import curves
from loftq_cli.reporting.page.encodings import Figure, significant
from loftq_cli.reporting.page.room import room
from loftq_cli.reporting.page.tables import kinds_table
from loftq_cli.reporting.summary import span, weighted_figure
from loftq_cli.settings.sizes import decimal

COLUMNS = (
    *("name", "kind", "block", "rows", "columns", "bits", "rank", "quantized", "final", "share"),
    *("weighted_quantized", "weighted_final"),
)
"""Of the data set of matrices. Residuals are relative, those of outputs null without statistics."""

_Report = Mapping[str, Any]


def document(
    output: Output,
    inspection: _Report,
    report: _Report,
    spectra: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The page on ``output``, of what ``loftq inspect`` and ``loftq error-report`` print as JSON
    and, if the original is there, the singular values of :mod:`loftq_cli.reporting.spectra`.

    Raises EnvironmentFailure if the extra [report] is missing.
    """
    layers = report["layers"]
    kinds = summary.kinds(layers)
    places = summary.places(layers)
    named = {name: spot.kind for name, spot in places.items()}
    adapter = summary.has_adapter(layers)
    weighted = "weighted_residual" in report["totals"]
    shown: list[Figure] = [
        figures.heat(kinds, adapter=adapter, weighted=weighted),
        figures.steps(layers, named),
        figures.spread(layers, adapter=adapter),
        curves(spectra),
        figures.weighted(layers, kinds),
        room(inspection["layers"], named, output.manifest["passed_through"]),
    ]
    refined = report.get("refined")
    gained = None if refined is None else figures.refined(refined)
    if gained is not None:
        shown.insert(1, gained)
    parts = [
        html.tiles(list(_tiles(inspection, report, adapter))),
        f"<section>{kinds_table(kinds, adapter=adapter)}</section>",
        *(html.section(figure) for figure in shown),
        _matrices(adapter, weighted),
        _footer(inspection, report),
    ]
    records = {layer["name"]: layer for layer in layers}
    rows = [_row(records[name], spot.kind, spot.block) for name, spot in places.items()]
    subtitle = _subtitle(layers, inspection["layers"][0]["layout"], adapter)
    return html.page(name_of(inspection), subtitle, "".join(parts), shown, COLUMNS, rows)


def name_of(inspection: _Report) -> str:
    """What the model is called: the last part of its source's path or id."""
    source = str(inspection["source"]["id"]).rstrip("/").rpartition("/")[2]
    return source or str(inspection["source"]["id"])


def _tiles(inspection: _Report, report: _Report, adapter: bool) -> Iterator[tuple[str, str, str]]:
    totals, found = inspection["totals"], report["totals"]
    for what, key in (("weights", "relative_residual"), ("outputs", "weighted_residual")):
        if key in found:
            more = f"{found[f'{key}_quantized']:.4f} without the adapter" if adapter else ""
            yield f"residual of the {what}", f"{found[key]:.4f}", more
    with_adapter = f"{totals['bits_per_weight_with_adapter']:.3f} with the adapter"
    yield "bits a weight", f"{totals['bits_per_weight']:.3f}", with_adapter if adapter else ""
    taken = totals["backbone_bytes"] + totals["adapter_bytes"]
    yield "size", decimal(taken), f"{decimal(totals['source_bytes'])} before"
    if report.get("refined", {}).get("end_to_end"):
        end = report["refined"]["end_to_end"]
        yield (
            "refined end to end",
            f"{end['held_after']:.4g}",
            f"nats a token of text held out, {end['held_before']:.4g} before",
        )


def _matrices(adapter: bool, weighted: bool) -> str:
    before = (("quantized", "without adapter", 4), ("share", "share left", 3)) if adapter else ()
    outputs = (("weighted_final", "of outputs", 4),) if weighted else ()
    words = "".join(_head(field, title) for field, title in (("name", "matrix"), ("kind", "kind")))
    numbers = (
        ("block", "block", 0),
        ("rows", "out", 0),
        ("columns", "in", 0),
        ("bits", "bits", 0),
        ("rank", "rank", 0),
        *(*before[:1], ("final", "residual", 4), *before[1:], *outputs),
    )
    heads = words + "".join(_head(*number) for number in numbers)
    return (
        '<section class="long" aria-labelledby="every"><h2 id="every">Every matrix</h2>'
        '<div class="controls"><input id="filter" type="search" aria-label="Filter the matrices"'
        ' placeholder="Filter: down_proj, layers.3., …"><output id="found" for="filter"></output>'
        '</div><div class="scroll"><table id="matrices"><caption>Relative to the weights; '
        f"headings sort</caption><thead><tr>{heads}</tr></thead><tbody></tbody></table></div>"
        '<p><button class="more" id="more" type="button">Show more</button></p></section>'
        "<noscript><p>Plots and this table need JavaScript, which this page brings along.</p>"
        "</noscript>"
    )


def _head(field: str, title: str, digits: int | None = None) -> str:
    kind = "" if digits is None else f' class="figure" data-digits="{digits}"'
    return f'<th scope="col" data-field="{field}"{kind}><button type="button">{title}</button></th>'


def _footer(inspection: _Report, report: _Report) -> str:
    source, tool = inspection["source"], inspection["tool"]
    revision = f" at {source['revision']}" if source["revision"] else ""
    recomputed = ", recomputed from the original weights" if report["recomputed"] else ""
    return (
        "<footer><p>A residual is the norm of W - Q - B·A relative to that of W: how near the "
        "weights are, not how good the model is.</p>"
        f"<p>{html.text(source['id'])}{html.text(revision)}{recomputed}. Made by "
        f"{html.text(tool['name'])} {html.text(tool['version'])}, fingerprint "
        f"<code>{html.text(inspection['fingerprint'])}</code>.</p></footer>"
    )


def _row(layer: Mapping[str, Any], kind: str, block: int | None) -> list[Any]:
    weighted = [weighted_figure(layer, which) for which in ("quantized", "final")]
    return [
        *(layer["name"], kind, block, *layer["shape"], layer["bits"], layer["rank"]),
        *(
            None if value is None else significant(value)
            for value in (
                layer["relative_residual_quantized"],
                layer["relative_residual"],
                layer["ratio"],
                *weighted,
            )
        ),
    ]


def _subtitle(layers: Sequence[Mapping[str, Any]], layout: str, adapter: bool) -> str:
    bits, ranks = (span(sorted({layer[key] for layer in layers})) for key in ("bits", "rank"))
    rank = f", rank {ranks}" if adapter else ", merged with what was trained"
    what = "what quantization took" + (", and what the adapter gave back" if adapter else "")
    return f"{bits} bits{rank}, layout {layout}: {what}"
