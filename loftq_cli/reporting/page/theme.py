"""How plots look: colours that colour-blind people tell apart, on light and on dark paper."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's palette without black and yellow, which light or dark paper would swallow.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c8c8c", "#a6761d")
SCHEME = "viridis"  # even in lightness: read without colours, too
BEFORE, AFTER = PALETTE[5], PALETTE[0]
"""Without and with the adapter; of a refinement, before and after it."""

# Colours of text and lines are the page's own, so that they follow it when it turns dark or is
# printed, without being drawn again.
_INK, _SOFT, _LINE = "var(--ink)", "var(--soft)", "var(--line)"
_FONT = "system-ui, sans-serif"


def config() -> dict[str, Any]:
    """The configuration of every plot of a page."""
    return {
        "background": "transparent",
        "font": _FONT,
        "view": {"stroke": None},
        "axis": {
            "labelColor": _SOFT,
            "titleColor": _SOFT,
            "titleFontWeight": 500,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "domainColor": _LINE,
            "tickColor": _LINE,
            "gridColor": _LINE,
            "gridDash": [2, 3],
        },
        "legend": {
            "labelColor": _INK,
            "titleColor": _SOFT,
            "titleFontWeight": 500,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "symbolStrokeWidth": 2,
        },
        "header": {"labelColor": _INK, "labelFontSize": 12, "title": None},
        "range": {"category": list(PALETTE)},
        "aria": True,
    }


def fixed(specification: dict[str, Any]) -> dict[str, Any]:
    """A plot for a picture that stands alone: dark on white, the page's own colours named."""
    names = {_INK: "#1a1d21", _SOFT: "#555c66", _LINE: "#d5d9df"}

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(each) for key, each in value.items()}
        if isinstance(value, list):
            return [named(each) for each in value]
        return names.get(value, value) if isinstance(value, str) else value

    found: dict[str, Any] = named({**specification, "config": config()})
    found["config"]["background"] = "white"
    return found
