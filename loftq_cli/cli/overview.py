"""What the reports on a conversion begin with: kinds of layers, depth, the worst matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from loftq_cli.cli import console
from loftq_cli.reporting import summary
from loftq_cli.reporting.summary import Depth, Kind, Spread, span

WORST = 10
"""How many matrices are listed as the worst."""

_Layers = Sequence[Mapping[str, Any]]


def overview(layers: _Layers, *, adapter: bool = True) -> None:
    """A row for each kind of layer, a strip over depth, and the worst of ``layers``. ``adapter``:
    whether there is one, without which there is one residual."""
    kinds = summary.kinds(layers)
    _kinds(kinds, adapter)
    _weighted([kind for kind in kinds if kind.weighted_final], adapter)
    _depths(kinds, summary.first_block(layers))
    _worst(layers)


def gains(told: Mapping[str, Any]) -> None:
    """What a refinement made of the error of each block, as a strip."""
    shares = [
        block["held_after"] / block["held_before"] if block["held_before"] else None
        for block in told["blocks"]
    ]
    depth = tuple(shares)
    known = [share for share in shares if share is not None]
    if len(known) > 1:
        between = min(known), max(known)
        _strips(
            "Refined: what is left of each block's error",
            [("gain", depth)],
            between,
            0,
        )


def _kinds(kinds: Sequence[Kind], adapter: bool) -> None:
    digits = _digits(kind.final for kind in kinds)
    rows = []
    for kind in kinds:
        cells = [kind.name, str(kind.count), _shapes(kind), span(kind.bits)]
        cells += [span(kind.ranks)] if adapter else []
        cells += _cells(kind.quantized, digits) if adapter else []
        rows.append([*cells, *_cells(kind.final, digits)])
    both = ("no adapter", "range") if adapter else ()
    columns = ("kind", "n", "shape", "bits", *(("rank",) if adapter else ()), *both)
    title = "Residuals relative to the weights: median and range of each kind of layer"
    console.compact_table(title, (*columns, "final", "range"), rows)


def _weighted(kinds: Sequence[Kind], adapter: bool) -> None:
    if not kinds:
        return
    digits = _digits(kind.weighted_final for kind in kinds)
    both = ("no adapter", "range") if adapter else ()
    rows = [
        [
            kind.name,
            *(_cells(kind.weighted_quantized, digits) if adapter else ()),
            *_cells(kind.weighted_final, digits),
        ]
        for kind in kinds
    ]
    title = "\nWeighted residuals, relative to the layers' outputs"
    console.compact_table(title, ("kind", *both, "final", "range"), rows)


def _depths(kinds: Sequence[Kind], first: int | None) -> None:
    between = summary.bounds(kinds)
    deep = [(kind.name, kind.depth) for kind in kinds if len(kind.depth) > 1]
    if between is not None and first is not None and deep:
        _strips("Final residuals over depth", deep, between, first)


def _strips(
    title: str, rows: Sequence[tuple[str, Depth]], between: tuple[float, float], first: int
) -> None:
    """A strip for each of ``rows``, below its name if that leaves room for a character a block,
    and else of several blocks a character."""
    rows = [(console.clean(name), depth) for name, depth in rows]
    label = min(max(len(name) for name, _ in rows), console.width() // 2)
    blocks, room = max(len(depth) for _, depth in rows), console.width() - label - 2
    below = room < blocks <= console.width()
    each = 1 if below else math.ceil(blocks / max(room, 1))
    marks = summary.MARKS if console.shows(summary.MARKS) else summary.PLAIN_MARKS
    digits = _places(between[0] or between[1])
    least, most = (_figure(value, digits) for value in between)
    scale = f"{marks[0]} {least} to {marks[-1]} {most}"
    many = "" if each == 1 else f", {each} a character"
    console.paragraph(f"\n{title}: blocks {first} to {first + blocks - 1}{many}, {scale}")
    for name, depth in rows:
        strip = summary.strip(depth, between, marks, each)
        console.line(f"{name}\n{strip}" if below else f"{name[-label:].ljust(label)}  {strip}")


def _worst(layers: _Layers) -> None:
    found = summary.worst(layers, WORST)
    digits = _places(min((layer["relative_residual"] for layer in found), default=0))
    console.line(f"\nThe worst {len(found)} of {len(layers)}" if len(layers) > 1 else "\nThe worst")
    for layer in found:
        value = _figure(layer["relative_residual"], digits)
        console.line(f"  {value}  {layer['bits']} bits  {console.clean(layer['name'])}")


def _cells(spread: Spread | None, digits: int) -> tuple[str, str]:
    if spread is None:
        return "", ""
    least, most = _figure(spread.least, digits), _figure(spread.most, digits)
    return _figure(spread.median, digits), least if least == most else f"{least}-{most}"


def _digits(spreads: Any) -> int:
    return _places(min((each.median for each in spreads if each is not None), default=0))


def _places(value: float) -> int:
    """Decimals that show three digits of ``value``."""
    return min(max(2 - math.floor(math.log10(value)), 3), 6) if value > 0 else 3


def _figure(value: float, digits: int) -> str:
    """Without the zero before the point, which takes room and says nothing."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("0") if value < 1 and text.startswith("0.") else text


def _shapes(kind: Kind) -> str:
    if len(kind.shapes) > 1:
        return f"{len(kind.shapes)} shapes"
    return "x".join(map(str, kind.shapes[0]))
