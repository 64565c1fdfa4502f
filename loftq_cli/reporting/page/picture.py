"""The picture of a model card: residuals by kind and depth, and what was evaluated, as SVG."""

from __future__ import annotations

from typing import Any

from loftq_cli.checkpoint.locate import Place
from loftq_cli.checkpoint.output import Output
from loftq_cli.errors import EnvironmentFailure, printable
from loftq_cli.machine.packages import required
from loftq_cli.reporting import evaluations, summary
from loftq_cli.reporting.inspect import inspect
from loftq_cli.reporting.page.comparison import bars
from loftq_cli.reporting.page.encodings import DEEP
from loftq_cli.reporting.page.theme import SCHEME, fixed
from loftq_cli.reporting.rows import EVALUATED

PICTURE = "loftq_residuals.svg"

_WIDTH = 640


def picture(output: Output) -> str | None:
    """SVG, None if the extra [report] is missing: a card does without."""
    try:
        library = required("vl_convert", "report", "a picture")
    except EnvironmentFailure:
        return None
    drawn: str = library.vegalite_to_svg(specification(output))
    return drawn


def specification(output: Output) -> dict[str, Any]:
    """What is drawn, as Vega-Lite has it."""
    layers = inspect(Place(output.directory))["layers"]
    kinds = summary.kinds(layers)
    first = summary.first_block(layers) or 0
    values = [
        {"kind": printable(kind.name), "block": first + number, "value": value}
        for kind in kinds
        for number, value in enumerate(kind.depth or (kind.final.median,))
        if value is not None
    ]
    heat = {
        "title": {"text": "Relative residual by kind of layer and block", "anchor": "start"},
        "data": {"values": values},
        "width": _WIDTH,
        "height": 20 * len(kinds),
        "mark": {"type": "rect", "stroke": "white"},
        "encoding": {
            "x": {"field": "block", **DEEP},
            "y": {
                "field": "kind",
                "type": "nominal",
                "sort": [printable(kind.name) for kind in kinds],
                "title": None,
                "axis": {"grid": False},
            },
            "color": {
                "field": "value",
                "type": "quantitative",
                "title": None,
                "scale": {"scheme": SCHEME, "reverse": True, "zero": False, "nice": False},
            },
        },
    }
    parts = [heat, *_evaluated(output)]
    return fixed({"vconcat": parts, "spacing": 28})


def _evaluated(output: Output) -> list[dict[str, Any]]:
    """The latest evaluation of the start: its first figure, beside the original's."""
    kept = evaluations.of_start(evaluations.saved(output))
    if not kept:
        return []
    entry = kept[-1]
    title, key, _ = next(each for each in EVALUATED if entry[each[1]] is not None)
    values = [{"conversion": "this model", "value": entry[key]}]
    if key == "perplexity" and entry["source_perplexity"] is not None:
        values.insert(0, {"conversion": "the original", "value": entry["source_perplexity"]})
    heading = f"{title.capitalize()} on {entry['samples']} windows of {entry['length']} tokens"
    drawn = {**bars(values, title), "width": _WIDTH}
    drawn["encoding"] = {k: v for k, v in drawn["encoding"].items() if k != "tooltip"}
    return [{**drawn, "title": {"text": heading, "anchor": "start"}}]
