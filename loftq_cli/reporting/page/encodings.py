"""What plots are made of: a figure, and the encodings that several of them have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loftq_cli.reporting.page.theme import AFTER, BEFORE

DEEP = {"type": "ordinal", "axis": {"labelOverlap": True, "labelAngle": 0, "grid": False}}
"""An axis of blocks, of which there may be many."""
BY_STEP = {
    "field": "step",
    "type": "ordinal",
    "title": "step T",
    "axis": {"labelAngle": 0, "grid": False},
}
"""An axis of steps of the alternation."""


@dataclass(frozen=True)
class Figure:
    """A plot: its heading, a sentence on how to read it, what it shows, for who does not see it,
    and its specification, None if there is nothing to show, which the sentence then explains."""

    name: str
    title: str
    caption: str
    alt: str
    specification: dict[str, Any] | None


def residual(field: str, title: str = "relative residual", **others: Any) -> dict[str, Any]:
    """An encoding of a residual; the axis need not begin at zero."""
    scale = {"zero": False, "nice": True, **others.pop("scale", {})}
    if scale.get("type") == "log":
        del scale["zero"]
    return {"field": field, "type": "quantitative", "title": title, "scale": scale, **others}


def hint(field: str, title: str, form: str | None = None) -> dict[str, Any]:
    """A line of what hovering shows."""
    found = {"field": field, "title": title}
    return found if form is None else {**found, "type": "quantitative", "format": form}


def labels(field: str, order: Sequence[str] | None) -> dict[str, Any]:
    """An axis of names, in that ``order``, None: as they come."""
    axis = {"grid": False, "labelLimit": 220}
    return {"field": field, "type": "nominal", "sort": order, "title": None, "axis": axis}


def pair(before: str, after: str, field: str = "which") -> dict[str, Any]:
    """Two colours for two of a kind."""
    return {
        "field": field,
        "type": "nominal",
        "title": None,
        "sort": [before, after],
        "scale": {"domain": [before, after], "range": [BEFORE, AFTER]},
        "legend": {"orient": "top"},
    }


def significant(value: float) -> float:
    """Six digits: as many as figures have that are read, and a third of the room."""
    return float(f"{value:.6g}")
