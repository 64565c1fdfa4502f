"""Matrices put together by what kind of layer they are of: what reports begin with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from loftq_cli.families.spots import Spot, spots

Depth = tuple[float | None, ...]
"""A figure for each block of the model, None where a kind has no matrix."""

MARKS = "▁▂▃▄▅▆▇█"
PLAIN_MARKS = ".:-=+*#@"
"""The characters of a strip, from the smallest residual to the largest."""


@dataclass(frozen=True)
class Spread:
    """Median and range of a figure."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Kind:
    """All matrices of one kind of layer. Residuals are relative to the weights, ``weighted`` ones
    to the outputs, None without statistics; ``quantized`` is without the adapter. ``depth`` has the
    median of ``final`` in each block."""

    name: str
    count: int
    shapes: tuple[tuple[int, int], ...]
    bits: tuple[int, ...]
    ranks: tuple[int, ...]
    quantized: Spread
    final: Spread
    weighted_quantized: Spread | None
    weighted_final: Spread | None
    depth: Depth

    def as_dict(self) -> dict[str, Any]:
        """For JSON, ``depth`` left out."""
        found: dict[str, Any] = {
            "kind": self.name,
            "matrices": self.count,
            "shapes": [list(shape) for shape in self.shapes],
            "bits": list(self.bits),
            "ranks": list(self.ranks),
        }
        for name in ("quantized", "final", "weighted_quantized", "weighted_final"):
            spread: Spread | None = getattr(self, name)
            found[name] = None if spread is None else vars(spread)
        return found


def places(layers: Sequence[Mapping[str, Any]]) -> dict[str, Spot]:
    """The spot of each of ``layers``, by the tensor's name, in the order of kinds."""
    modules = {layer["name"].removesuffix(".weight"): layer["name"] for layer in layers}
    return {modules[module]: spot for module, spot in spots(modules).items()}


def kinds(layers: Sequence[Mapping[str, Any]]) -> list[Kind]:
    """The kinds of ``layers``, which are those of an inspection or of an error report."""
    named = {layer["name"]: layer for layer in layers}
    found: dict[str, list[tuple[int | None, Mapping[str, Any]]]] = {}
    for name, spot in places(layers).items():
        found.setdefault(spot.kind, []).append((spot.block, named[name]))
    blocks = [block for members in found.values() for block, _ in members if block is not None]
    every = range(min(blocks), max(blocks) + 1) if blocks else range(0)
    return [_kind(name, members, every) for name, members in found.items()]


def worst(layers: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The ``count`` layers of the largest relative residuals, the largest first."""
    return sorted(layers, key=lambda layer: -layer["relative_residual"])[:count]


def first_block(layers: Sequence[Mapping[str, Any]]) -> int | None:
    """The number of the first block, with which every ``depth`` begins; None without blocks."""
    blocks = [spot.block for spot in places(layers).values() if spot.block is not None]
    return min(blocks, default=None)


def has_adapter(layers: Iterable[Mapping[str, Any]]) -> bool:
    """Whether there is an adapter: not if a trained one was merged into the codes."""
    return any(layer["rank"] for layer in layers)


def together(layers: Sequence[Mapping[str, Any]], which: str) -> float:
    """The relative residual of ``layers`` as if they were one matrix, 0 if that is zero."""
    weight = math.fsum(layer["weight"] ** 2 for layer in layers)
    return math.sqrt(math.fsum(layer[which] ** 2 for layer in layers) / weight) if weight else 0.0


def span(values: Sequence[int]) -> str:
    """The smallest and the largest of sorted ``values``."""
    return str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"


def bounds(kinds: Iterable[Kind]) -> tuple[float, float] | None:
    """The smallest and the largest figure in their depths, None without blocks."""
    values = [value for kind in kinds for value in kind.depth if value is not None]
    return (min(values), max(values)) if values else None


def strip(depth: Depth, between: tuple[float, float], marks: str = MARKS, each: int = 1) -> str:
    """A character for ``each`` blocks, by where their largest figure lies ``between`` two others;
    a space where there is no matrix."""
    least, most = between
    found = []
    for start in range(0, len(depth), each):
        values = [value for value in depth[start : start + each] if value is not None]
        share = (max(values) - least) / (most - least) if values and most > least else 0.0
        place = min(int(min(max(share, 0.0), 1.0) * len(marks)), len(marks) - 1)
        found.append(marks[place] if values else " ")
    return "".join(found)


def weighted_figure(layer: Mapping[str, Any], which: str) -> float | None:
    """A residual of ``layer``'s outputs, relative to them; None without statistics."""
    weighted = layer.get("weighted")
    return None if weighted is None else float(weighted[which] / (weighted["weight"] or 1.0))


def _kind(
    name: str, members: Sequence[tuple[int | None, Mapping[str, Any]]], blocks: range
) -> Kind:
    layers = [layer for _, layer in members]
    by_block: dict[int | None, list[float]] = {}
    for block, layer in members:
        by_block.setdefault(block, []).append(layer["relative_residual"])
    within = any(block is not None for block, _ in members)
    outputs = {
        which: [f for layer in layers if (f := weighted_figure(layer, which)) is not None]
        for which in ("quantized", "final")
    }
    return Kind(
        name=name,
        count=len(layers),
        shapes=tuple(sorted({(layer["shape"][0], layer["shape"][1]) for layer in layers})),
        bits=tuple(sorted({layer["bits"] for layer in layers})),
        ranks=tuple(sorted({layer["rank"] for layer in layers})),
        quantized=_spread([layer["relative_residual_quantized"] for layer in layers]),
        final=_spread([layer["relative_residual"] for layer in layers]),
        weighted_quantized=_spread(outputs["quantized"]) if outputs["quantized"] else None,
        weighted_final=_spread(outputs["final"]) if outputs["final"] else None,
        depth=tuple(median(by_block[b]) if b in by_block else None for b in blocks)
        if within
        else (),
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))
