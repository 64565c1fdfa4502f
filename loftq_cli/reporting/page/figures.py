"""The plots of a report on one conversion, as Vega-Lite has them.

Plots of single matrices share one data set, ``rows``, that is in the page once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loftq_cli.reporting import summary
from loftq_cli.reporting.page.encodings import (
    BY_STEP,
    DEEP,
    Figure,
    hint,
    labels,
    pair,
    residual,
    significant,
)
from loftq_cli.reporting.page.theme import AFTER, PALETTE, SCHEME
from loftq_cli.reporting.summary import Kind

WITHOUT, WITH = "without the adapter", "with the adapter"
_ROWS = {"name": "rows"}
_SHARE = "the share that is left"
_METRICS = {
    WITH: "final",
    WITHOUT: "quantized",
    _SHARE: "share",
    "of outputs, with the adapter": "weighted_final",
    "of outputs, without": "weighted_quantized",
}

_Layers = Sequence[Mapping[str, Any]]


def heat(kinds: Sequence[Kind], *, adapter: bool, weighted: bool) -> Figure:
    """Kinds of layers by depth."""
    deep = [kind for kind in kinds if kind.depth]
    metrics = dict(list(_METRICS.items())[: 5 if weighted else 3])
    if not adapter:
        metrics = {"as it is": "final"}
    chosen, values = list(metrics), list(metrics.values())
    measured = [{"op": "median", "field": field, "as": field} for field in values]
    specification = {
        "data": _ROWS,
        "width": "container",
        "height": 24 * len(deep),
        "params": [
            {"name": "dark", "value": False},
            {
                "name": "shown",
                "value": chosen[0],
                "bind": {"input": "select", "options": chosen, "name": "Residual "},
            },
        ],
        "transform": [
            {"filter": "datum.block != null"},
            {
                "aggregate": [*measured, {"op": "count", "as": "n"}],
                "groupby": ["kind", "block"],
            },
            {"calculate": f"datum[{dict(zip(chosen, values))}[shown]]", "as": "value"},
        ],
        "mark": {"type": "rect", "stroke": "var(--paper)", "strokeWidth": 1, "aria": False},
        "encoding": {
            "x": {"field": "block", "title": "block", **DEEP},
            "y": labels("kind", [kind.name for kind in deep]),
            "color": residual(
                "value", scale={"scheme": SCHEME, "reverse": {"expr": "!dark"}, "nice": False}
            ),
            "tooltip": [
                hint("kind", "kind"),
                hint("block", "block"),
                hint("n", "matrices"),
                *(hint(field, name, ".4f") for name, field in metrics.items()),
            ],
        },
    }
    several = any(kind.count > len([d for d in kind.depth if d is not None]) for kind in deep)
    return Figure(
        "heat",
        "Where the error is",
        "Each cell is a matrix, a row is a kind of layer, from the first block to the last."
        + (" Of several matrices in a block it is their median." if several else ""),
        _highest(deep),
        specification if deep else None,
    )


def steps(layers: _Layers, kinds: Mapping[str, str]) -> Figure:
    """Residual by step T, of the weights and, with statistics, of the outputs. ``kinds``: the kind
    of each matrix by its name."""
    most = max((len(layer["steps"]) for layer in layers), default=0)
    groups: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in kinds.values()}
    for layer in layers:
        groups[kinds[layer["name"]]].append(layer)
    groups = {**groups, _ALL: list(layers)}
    values = [
        {"kind": kind, "of": of, **entry}
        for kind, group in groups.items()
        for of, records in (
            (_WEIGHTS, group),
            (_OUTPUTS, [layer["weighted"] for layer in group if layer["weighted"]]),
        )
        for entry in _by_step([each for each in records if len(each["steps"]) == most], most)
    ]
    said = []
    for of in (_WEIGHTS, _OUTPUTS):
        course = [v["value"] for v in values if v["kind"] == _ALL and v["of"] == of]
        if course:
            said.append(f"{of} from {course[0]:.4f} to {course[-1]:.4f}")
    title = "What every step is worth"
    if not most:
        told = "The manifest tells of no steps: what was refined or merged has none."
        return Figure("steps", title, told, "", None)
    chosen = [of for of in (_WEIGHTS, _OUTPUTS) if any(value["of"] == of for value in values)]
    bind = {"input": "select", "options": chosen, "name": "Residual "}
    return Figure(
        "steps",
        title,
        "Step 0 is quantization alone; each further step T quantizes again what the adapter "
        "leaves, and fits the adapter to what that leaves. Matrices of a kind together."
        + (" With statistics it is the residual of the outputs that falls." if said[1:] else ""),
        f"All matrices together, in {most} steps: {', '.join(said)}.",
        {
            "data": {"values": values},
            "width": "container",
            "height": 280,
            "params": [{"name": "of", "value": chosen[-1], "bind": bind}],
            "transform": [{"filter": "datum.of == of"}],
            "mark": {"type": "line", "point": {"size": 55, "filled": True}, "aria": False},
            "encoding": {
                "x": BY_STEP,
                "y": residual("value"),
                **_by_kind(list(groups)),
                "strokeWidth": {
                    "condition": {"test": f"datum.kind == '{_ALL}'", "value": 4},
                    "value": 2,
                },
                "tooltip": [
                    hint("kind", "kind"),
                    hint("step", "step"),
                    hint("value", "residual", ".4f"),
                    hint("n", "matrices"),
                ],
            },
        },
    )


_ALL, _WEIGHTS, _OUTPUTS = "all", "of the weights", "of the outputs"


def _by_step(records: _Layers, most: int) -> Iterator[dict[str, Any]]:
    """What all ``records`` together have of each step, 0 for quantization alone."""
    weight = math.fsum(record["weight"] ** 2 for record in records)
    for step in range(most + 1 if weight else 0):
        norms = (r["steps"][step - 1] if step else r["quantized"] for r in records)
        value = math.sqrt(math.fsum(norm**2 for norm in norms) / weight)
        yield {"step": step, "value": significant(value), "n": len(records)}


def spread(layers: _Layers, *, adapter: bool) -> Figure:
    """How many matrices have which residual."""
    found = [layer["relative_residual"] for layer in layers]
    shown = ["quantized", "final"] if adapter else ["final"]
    names = f"datum.which == 'final' ? '{WITH if adapter else 'as it is'}' : '{WITHOUT}'"
    said = f"{len(found)} matrices, from {min(found):.4f} to {max(found):.4f}."
    return Figure(
        "spread",
        "How the residuals are spread",
        "How many matrices have which residual relative to their weights.",
        said,
        {
            "data": _ROWS,
            "width": "container",
            "height": 220,
            "transform": [
                {"fold": shown, "as": ["which", "value"]},
                {"calculate": names, "as": "which"},
                {"bin": {"maxbins": 60}, "field": "value", "as": ["from", "to"]},
                {
                    "aggregate": [{"op": "count", "as": "n"}],
                    "groupby": ["which", "from", "to"],
                },
            ],
            "mark": {"type": "bar", "opacity": 0.75, "binSpacing": 0.5, "aria": False},
            "encoding": {
                "x": residual("from", bin={"binned": True}),
                "x2": {"field": "to"},
                "y": {
                    "field": "n",
                    "type": "quantitative",
                    "title": "matrices",
                    "stack": None,
                    "axis": {"tickMinStep": 1},
                },
                "color": pair(WITHOUT, WITH) if adapter else {"value": AFTER},
                "tooltip": [
                    hint("which", "residual"),
                    hint("from", "from", ".4f"),
                    hint("to", "to", ".4f"),
                    hint("n", "matrices"),
                ],
            },
        },
    )


def weighted(layers: _Layers, kinds: Sequence[Kind]) -> Figure:
    """Residuals of outputs against those of weights."""
    there = [layer for layer in layers if summary.weighted_figure(layer, "final")]
    scale = {"type": "log", "nice": False, "padding": 12}
    return Figure(
        "weighted",
        "Weights against outputs",
        "Left to right, how far the weights are off; upwards, how far the layer's outputs are on "
        "text like that measured. Low points to the right gave up weights that matter little."
        if there
        else "There are no activation statistics: convert with --stats or --calibrate-text, or "
        "give --source and --stats to this report.",
        f"{len(there)} matrices with statistics." if there else "",
        {
            "data": _ROWS,
            "width": "container",
            "height": 320,
            "transform": [{"filter": "datum.weighted_final > 0 && datum.final > 0"}],
            "mark": {"type": "point", "filled": True, "size": 45, "opacity": 0.8, "aria": False},
            "encoding": {
                "x": residual("final", "residual of the weights", scale=scale),
                "y": residual("weighted_final", "residual of the outputs", scale=scale),
                **_by_kind([kind.name for kind in kinds]),
                "tooltip": [
                    hint("name", "matrix"),
                    hint("final", "weights", ".4f"),
                    hint("weighted_final", "outputs", ".4f"),
                    hint("weighted_quantized", "outputs, without adapter", ".4f"),
                ],
            },
        }
        if there
        else None,
    )


def refined(told: Mapping[str, Any]) -> Figure | None:
    """Losses of a refinement by block; None if blocks were not trained one by one."""
    blocks = [block for block in told["blocks"] if block["held_before"]]
    if not blocks:
        return None
    values = [
        {
            "block": number,
            "name": block["name"],
            "when": when,
            "loss": block[key],
            "kept": f"{block['kept']} of {block['steps']} steps",
        }
        for number, block in enumerate(blocks)
        for when, key in (("before", "held_before"), ("after", "held_after"))
        if block[key]
    ]
    shares = [block["held_after"] / block["held_before"] for block in blocks]
    scale = {"type": "log", "nice": True}
    tooltip = [
        hint("name", "block"),
        hint("when", "refinement"),
        hint("loss", "loss", ".5g"),
        hint("kept", "kept after"),
    ]
    return Figure(
        "refined",
        "What refining gained",
        "The error of each block's outputs on text that was held out, before and after.",
        f"The error of {sum(share < 1 for share in shares)} of {len(shares)} blocks fell.",
        {
            "data": {"values": values},
            "width": "container",
            "height": 240,
            "encoding": {"x": {"field": "block", "title": "block", **DEEP}},
            "layer": [
                {
                    "mark": {"type": "line", "color": "var(--soft)", "aria": False},
                    "encoding": {
                        "y": residual("loss", "loss of text held out", scale=scale),
                        "detail": {"field": "block"},
                    },
                },
                {
                    "mark": {"type": "point", "filled": True, "size": 60, "aria": False},
                    "encoding": {
                        "y": residual("loss", "loss of text held out", scale=scale),
                        "color": {**pair("before", "after", "when")},
                        "tooltip": tooltip,
                    },
                },
            ],
        },
    )


def _by_kind(order: Sequence[str]) -> dict[str, Any]:
    """Colour and shape: they are told apart without colours. All kinds together are in ink."""
    colours = [PALETTE[number % len(PALETTE)] for number in range(len(order))]
    if order[-1] == _ALL:
        colours[-1] = "var(--ink)"
    each = {"field": "kind", "type": "nominal", "title": None}
    return {
        "color": {**each, "scale": {"domain": list(order), "range": colours}},
        "shape": {**each, "scale": {"domain": list(order)}},
    }


def _highest(kinds: Sequence[Kind]) -> str:
    cells = [(value, kind.name) for kind in kinds for value in kind.depth if value is not None]
    if not cells:
        return "No matrix is in a block."
    (least, lowest), (most, highest) = min(cells), max(cells)
    return f"From {least:.4f} ({lowest}) to {most:.4f} ({highest})."
