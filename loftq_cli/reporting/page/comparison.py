"""``loftq compare --html``: several conversions of one model on one page, their plots overlaid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from loftq_cli.reporting import summary
from loftq_cli.reporting.compare import Compared
from loftq_cli.reporting.page import html
from loftq_cli.reporting.page.document import name_of
from loftq_cli.reporting.page.encodings import BY_STEP, Figure, hint, labels, residual, significant
from loftq_cli.reporting.rows import EVALUATED, figure, rows_of
from loftq_cli.settings.sizes import decimal

_Conversions = Sequence[Compared]


def comparison(conversions: _Conversions, found: Mapping[str, Any]) -> str:
    """The page on ``conversions``, of which ``found`` is what ``loftq compare`` prints as JSON.

    Raises EnvironmentFailure if the extra [report] is missing.
    """
    names = [each.label for each in conversions]
    shown = [_kinds(found, names), _depth(conversions), _steps(conversions), _shares(conversions)]
    shown += [_room(found), *_evaluations(found, names)]
    rows = [(title, *cells) for title, cells in rows_of(found)]
    body = [
        f"<section>{html.table('What they are', ('', *names), rows)}</section>",
        *(html.section(plot) for plot in shown),
        "<footer><p>A residual is the norm of W - Q - B·A relative to that of W, over the matrices "
        f"that all have: {found['matrices_in_common']}. It says how near the weights are, not how "
        "good the model is.</p></footer>",
    ]
    title = f"{name_of(conversions[0].inspection)}: {len(names)} conversions"
    return html.page(title, ", ".join(names), "".join(body), shown)


def _kinds(found: Mapping[str, Any], names: Sequence[str]) -> Figure:
    values = [
        {
            "kind": kind["kind"],
            "conversion": name,
            **{key: significant(each["final"][key]) for key in ("median", "least", "most")},
            "n": each["matrices"],
        }
        for kind in found["kinds"]
        for name, each in zip(names, kind["conversions"], strict=True)
        if each is not None
    ]
    y = labels("kind", [kind["kind"] for kind in found["kinds"]])
    apart = {
        "yOffset": {"field": "conversion", "sort": list(names)},
        "color": _by_conversion(names),
    }
    tooltip = [
        hint("conversion", "conversion"),
        hint("kind", "kind"),
        hint("median", "median", ".4f"),
        hint("least", "from", ".4f"),
        hint("most", "to", ".4f"),
        hint("n", "matrices"),
    ]
    return Figure(
        "kinds",
        "Residuals by kind of layer",
        "The point is the median of a kind's matrices, the line their range.",
        "; ".join(
            f"{name}: {figure(each['relative_residual'])} over all"
            for name, each in zip(names, found["conversions"], strict=True)
        )
        + ".",
        {
            "data": {"values": values},
            "width": "container",
            "height": (10 * len(names) + 12) * len(found["kinds"]),
            "encoding": {"y": y, **apart, "tooltip": tooltip},
            "layer": [
                {
                    "mark": {"type": "rule", "strokeWidth": 2, "aria": False},
                    "encoding": {"x": residual("least"), "x2": {"field": "most"}},
                },
                {
                    "mark": {"type": "point", "filled": True, "size": 60, "aria": False},
                    "encoding": {"x": residual("median"), "shape": _by_conversion(names)},
                },
            ],
        },
    )


def _depth(conversions: _Conversions) -> Figure:
    names = [each.label for each in conversions]
    values: list[dict[str, Any]] = []
    order: dict[str, None] = {}
    for each in conversions:
        first = summary.first_block(each.report["layers"]) or 0
        for kind in summary.kinds(each.report["layers"]):
            order[kind.name] = None
            values += [
                {
                    "kind": kind.name,
                    "block": first + number,
                    "conversion": each.label,
                    "value": significant(value),
                }
                for number, value in enumerate(kind.depth)
                if value is not None
            ]
    return Figure(
        "depth",
        "Residuals over depth",
        "A plot for each kind of layer, from the first block to the last.",
        f"{len(order)} kinds of layers.",
        {
            "data": {"values": values},
            "columns": 3,
            "facet": {"field": "kind", "type": "nominal", "sort": list(order)},
            "spec": {
                "width": 250,
                "height": 130,
                "mark": {"type": "line", "point": {"size": 14}, "aria": False},
                "encoding": {
                    "x": {
                        "field": "block",
                        "type": "quantitative",
                        "title": "block",
                        "axis": {"grid": False, "tickMinStep": 1, "format": "d"},
                        "scale": {"nice": False, "zero": False},
                    },
                    "y": residual("value", "residual"),
                    "color": _by_conversion(names),
                    "tooltip": [
                        hint("conversion", "conversion"),
                        hint("kind", "kind"),
                        hint("block", "block", "d"),
                        hint("value", "residual", ".4f"),
                    ],
                },
            },
        }
        if values
        else None,
    )


def _steps(conversions: _Conversions) -> Figure:
    values = []
    for each in conversions:
        layers = [layer for layer in each.report["layers"] if layer["steps"]]
        most = max((len(layer["steps"]) for layer in layers), default=0)
        weight = math.fsum(layer["weight"] ** 2 for layer in layers)
        for step in range(most + 1 if weight else 0):
            norms = ([layer["quantized"], *layer["steps"]] for layer in layers)
            total = math.fsum(found[min(step, len(found) - 1)] ** 2 for found in norms)
            value = significant(math.sqrt(total / weight))
            values.append({"conversion": each.label, "step": step, "value": value})
    names = [each.label for each in conversions]
    return Figure(
        "steps",
        "What every step is worth",
        "All matrices together; step 0 is quantization alone. What was refined or merged tells of "
        "no steps.",
        f"{len({value['conversion'] for value in values})} conversions tell of their steps.",
        {
            "data": {"values": values},
            "width": "container",
            "height": 240,
            "mark": {"type": "line", "point": {"size": 55, "filled": True}, "aria": False},
            "encoding": {
                "x": BY_STEP,
                "y": residual("value"),
                "color": _by_conversion(names),
                "shape": _by_conversion(names),
                "tooltip": [
                    hint("conversion", "conversion"),
                    hint("step", "step"),
                    hint("value", "residual", ".4f"),
                ],
            },
        }
        if values
        else None,
    )


_POINTS = 200  # of a curve


def _shares(conversions: _Conversions) -> Figure:
    values = []
    for each in conversions:
        found = sorted(layer["relative_residual"] for layer in each.report["layers"])
        every = max(1, len(found) // _POINTS)
        values += [
            {
                "conversion": each.label,
                "value": significant(value),
                "share": significant(number / len(found)),
            }
            for number, value in enumerate(found, 1)
            if number % every == 0 or number in (1, len(found))
        ]
    names = [each.label for each in conversions]
    return Figure(
        "spread",
        "How the residuals are spread",
        "The share of matrices whose residual is at most so much: further left is nearer.",
        "; ".join(f"{each.label}: half are below {_middle(each):.4f}" for each in conversions)
        + ".",
        {
            "data": {"values": values},
            "width": "container",
            "height": 240,
            "mark": {"type": "line", "interpolate": "step-after", "point": True, "aria": False},
            "encoding": {
                "x": residual("value"),
                "y": {
                    "field": "share",
                    "type": "quantitative",
                    "title": "share of matrices",
                    "axis": {"format": ".0%"},
                },
                "color": _by_conversion(names),
                "tooltip": [
                    hint("conversion", "conversion"),
                    hint("value", "residual", ".4f"),
                    hint("share", "share", ".1%"),
                ],
            },
        },
    )


def _middle(each: Compared) -> float:
    return median(float(layer["relative_residual"]) for layer in each.report["layers"])


def _room(found: Mapping[str, Any]) -> Figure:
    values = [
        {"conversion": each["label"], "what": what, "MB": each[key] / 1e6}
        for each in found["conversions"]
        for what, key in (("backbone", "backbone_bytes"), ("adapter", "adapter_bytes"))
    ]
    return Figure(
        "room",
        "What they take",
        "Backbone and adapter, tensors that were copied included.",
        "; ".join(
            f"{each['label']}: {decimal(each['backbone_bytes'] + each['adapter_bytes'])}"
            for each in found["conversions"]
        )
        + ".",
        {
            "data": {"values": values},
            "width": "container",
            "height": 30 * len(found["conversions"]),
            "mark": {"type": "bar", "aria": False},
            "encoding": {
                "y": labels("conversion", None),
                "x": {"field": "MB", "type": "quantitative"},
                "order": {"field": "what", "sort": "descending"},
                "color": {
                    "field": "what",
                    "type": "nominal",
                    "title": None,
                    "scale": {"domain": ["backbone", "adapter"]},
                    "legend": {"orient": "top"},
                },
                "tooltip": [
                    hint("conversion", "conversion"),
                    hint("what", "what"),
                    hint("MB", "MB", ",.3f"),
                ],
            },
        },
    )


def _evaluations(found: Mapping[str, Any], names: Sequence[str]) -> Iterator[Figure]:
    for number, evaluation in enumerate(found["evaluations"]):
        figures = evaluation["conversions"]
        measured = next(
            (m for m in EVALUATED if any(each and each[m[1]] is not None for each in figures)), None
        )
        if measured is None:
            continue
        title, key, form = measured
        values = [
            {"conversion": name, "value": each[key]}
            for name, each in zip(names, figures, strict=True)
            if each is not None and each[key] is not None
        ]
        original = next((each["source_perplexity"] for each in figures if each), None)
        if key == "perplexity" and original is not None:
            values.insert(0, {"conversion": "the original", "value": original})
        windows = f"{evaluation['samples']} windows of {evaluation['length']} tokens"
        yield Figure(
            f"evaluation{number}",
            f"Evaluated: {title}",
            f"On {windows}, the same for all.",
            "; ".join(f"{v['conversion']}: {form.format(v['value'])}" for v in values) + ".",
            bars(values, title),
        )


def bars(values: Sequence[Mapping[str, Any]], title: str) -> dict[str, Any]:
    """A bar for each of ``values``: ``conversion`` and ``value``."""
    return {
        "data": {"values": list(values)},
        "width": "container",
        "height": 30 * len(values),
        "mark": {"type": "bar", "aria": False},
        "encoding": {
            "y": labels("conversion", None),
            "x": {"field": "value", "type": "quantitative", "title": title},
            "tooltip": [hint("conversion", "conversion"), hint("value", title, ".4g")],
        },
    }


def _by_conversion(names: Sequence[str]) -> dict[str, Any]:
    """For colour and shape alike, so that they share a legend."""
    scale, legend = {"domain": list(names)}, {"orient": "top"}
    told = {"field": "conversion", "type": "nominal", "title": None}
    return {**told, "scale": scale, "legend": legend}
