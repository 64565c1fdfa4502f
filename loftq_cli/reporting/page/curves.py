"""The plot of singular values: what the adapter took away, and what it left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loftq_cli.reporting.page.encodings import Figure, hint, pair, residual
from loftq_cli.reporting.page.figures import WITH, WITHOUT

_UNKNOWN = (
    "Singular values are those of the original weights' residuals. Name the checkpoint that was "
    "converted: loftq error-report DIR --source MODEL --html FILE."
)


def curves(spectra: Sequence[Mapping[str, Any]] | None) -> Figure:
    """Singular values of the worst matrices' residuals; None: the original was not there."""
    title = "What is left of the worst matrices"
    if spectra is None:
        return Figure("spectra", title, _UNKNOWN, "", None)
    values = [
        {"name": each["name"].removesuffix(".weight"), "n": n, "value": value, "which": which}
        for each in spectra
        for which, key in ((WITHOUT, "alone"), (WITH, "final"))
        for n, value in each[key]
    ]
    order = [each["name"].removesuffix(".weight") for each in spectra]
    return Figure(
        "spectra",
        title,
        "Singular values of the residual, relative to the norm of the weights, from the largest. "
        "An adapter of rank r takes away what r directions hold; a flat curve has no more of them.",
        "; ".join(
            f"{each['name']}: the largest {each['alone'][0][1]:.4f} without the adapter, "
            f"{each['final'][0][1]:.4f} with it"
            for each in spectra
        )
        + ".",
        {
            "data": {"values": values},
            "columns": 3,
            "facet": {"field": "name", "type": "nominal", "sort": order},
            "spec": {
                "width": 250,
                "height": 150,
                "mark": {"type": "line", "point": {"size": 12}, "aria": False},
                "encoding": {
                    "x": {
                        "field": "n",
                        "type": "quantitative",
                        "title": "number",
                        "scale": {"type": "log", "nice": False},
                        "axis": {"format": "d", "grid": False, "tickCount": 4},
                    },
                    "y": residual("value", "singular value", scale={"zero": True}),
                    "color": pair(WITHOUT, WITH),
                    "tooltip": [
                        hint("name", "matrix"),
                        hint("which", "residual"),
                        hint("n", "number", "d"),
                        hint("value", "singular value", ".5f"),
                    ],
                },
            },
        },
    )
