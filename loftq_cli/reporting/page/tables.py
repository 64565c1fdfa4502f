"""What a notebook shows of a report: a few small tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from loftq_cli.reporting import summary
from loftq_cli.reporting.page.html import table, text
from loftq_cli.reporting.rows import EVALUATED, figure, rows_of
from loftq_cli.reporting.summary import Kind, Spread, span
from loftq_cli.settings.sizes import decimal

_WORST = 5
_WIDEST = 48  # characters of a strip: a deeper model has several blocks in each

_Report = Mapping[str, Any]


def shown(report: _Report, kind: str) -> str:
    """The HTML of a report of this ``kind`` (:class:`loftq_cli.reporting.notebook.Shown`)."""
    parts: dict[str, Callable[[_Report], Iterator[str]]] = {
        "inspection": _inspection,
        "residuals": _residuals,
        "comparison": _comparison,
        "evaluation": _evaluation,
    }
    return f"<div>{''.join(parts[kind](report))}</div>"


def kinds_table(kinds: Sequence[Kind], *, adapter: bool) -> str:
    """A row for each kind of layer, with a strip over depth."""
    between = summary.bounds(kinds)
    rows = []
    for kind in kinds:
        each = -(-len(kind.depth) // _WIDEST)
        strip = summary.strip(kind.depth, between, each=each) if between and kind.depth else ""
        before = (_spread(kind.quantized),) if adapter else ()
        shapes = ", ".join(f"{rows}x{columns}" for rows, columns in kind.shapes[:2])
        more = f" and {len(kind.shapes) - 2} more" if len(kind.shapes) > 2 else ""
        rows.append(
            (
                *(kind.name, strip, kind.count, shapes + more, span(kind.bits)),
                *(span(kind.ranks), *before, _spread(kind.final)),
            )
        )
    both = ("without adapter",) if adapter else ()
    columns = ("kind", "over depth", "matrices", "shape", "bits", "rank", *both, "residual")
    caption = "Kinds of layers: median and range of their residuals, relative to the weights"
    return table(caption, columns, rows, words=2).replace("<td>", '<td class="depth">')


def _inspection(found: _Report) -> Iterator[str]:
    totals = found["totals"]
    yield table(
        str(found["directory"]),
        ("", ""),
        [
            ("source", found["source"]["id"]),
            ("matrices", len(found["layers"])),
            ("layout", found["layers"][0]["layout"]),
            (
                "backbone",
                f"{decimal(totals['source_bytes'])} -> {decimal(totals['backbone_bytes'])}",
            ),
            ("adapter", decimal(totals["adapter_bytes"])),
            ("bits per weight", f"{totals['bits_per_weight']:.3f}"),
            ("with the adapter", f"{totals['bits_per_weight_with_adapter']:.3f}"),
        ],
    )
    yield _kinds(found["layers"])
    yield f"<pre>{_code(found['loading'])}</pre>"


def _residuals(found: _Report) -> Iterator[str]:
    totals = found["totals"]
    rows = [
        ("with the adapter", figure(totals["relative_residual"])),
        ("without", figure(totals["relative_residual_quantized"])),
    ]
    if "weighted_residual" in totals:
        rows.append(("of the outputs, with", figure(totals["weighted_residual"])))
        rows.append(("of the outputs, without", figure(totals["weighted_residual_quantized"])))
    yield table(f"{found['directory']}: residuals", ("", ""), rows)
    yield _kinds(found["layers"])
    worst = summary.worst(found["layers"], _WORST)
    told = [(layer["name"], figure(layer["relative_residual"])) for layer in worst]
    yield table(f"The worst {len(told)}", ("matrix", "residual"), told)


def _comparison(found: _Report) -> Iterator[str]:
    names = [each["label"] for each in found["conversions"]]
    rows = [(title, *cells) for title, cells in rows_of(found)]
    yield table(f"Conversions of {found['source']['id']}", ("", *names), rows)
    kinds = [
        (kind["kind"], *(figure(each and each["final"]["median"]) for each in kind["conversions"]))
        for kind in found["kinds"]
    ]
    yield table("Residuals by kind of layer: medians", ("kind", *names), kinds)


def _evaluation(found: _Report) -> Iterator[str]:
    rows = [
        (title, form.format(found[key])) for title, key, form in EVALUATED if found[key] is not None
    ]
    windows = f"{found['samples']} windows of {found['length']} tokens"
    yield table(str(found["directory"]), ("", ""), [*rows, ("text", windows)])


def _kinds(layers: Sequence[_Report]) -> str:
    return kinds_table(summary.kinds(layers), adapter=summary.has_adapter(layers))


def _code(source: str) -> str:
    return "\n".join(text(line) for line in source.splitlines())


def _spread(spread: Spread) -> str:
    return f"{spread.median:.4f} ({spread.least:.4f}-{spread.most:.4f})"
