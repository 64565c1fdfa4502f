"""The plot of bits and bytes: what each part of an output takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loftq_cli.checkpoint.dtypes import BITS
from loftq_cli.reporting.page.encodings import Figure, hint, labels
from loftq_cli.reporting.page.theme import AFTER, BEFORE, PALETTE

_CODES, _PAIRS, _KEPT = "codes and scales", "adapter", "as it was"
_MOST_NAMED = 8
_NAMED = 0.01  # of all copied bytes: tensors that are smaller are put together


def room(
    layers: Sequence[Mapping[str, Any]],
    kinds: Mapping[str, str],
    passed_through: Sequence[Mapping[str, Any]],
) -> Figure:
    """Bytes by part, of the ``layers`` of an inspection and the tensors that were copied."""
    values = [*_quantized(layers, kinds), *_copied(passed_through)]
    order = list(dict.fromkeys(value["part"] for value in values))
    total = sum(value["bytes"] for value in values)
    (largest, most) = max(_sums(values).items(), key=lambda item: item[1])
    colours = {_CODES: AFTER, _PAIRS: BEFORE, _KEPT: PALETTE[6]}
    return Figure(
        "room",
        "Where the bytes are",
        "What each part takes, in codes, scales and zero points, in the adapter, and in tensors "
        "that were copied.",
        f"{total / 1e9:.3f} GB in all, of which {largest} takes {most / 1e9:.3f} GB.",
        {
            "data": {"values": values},
            "width": "container",
            "height": 26 * len(order),
            "transform": [{"calculate": "datum.bytes / 1e6", "as": "MB"}],
            "mark": {"type": "bar", "aria": False},
            "encoding": {
                "y": labels("part", order),
                "x": {"field": "MB", "type": "quantitative", "title": "MB"},
                "color": {
                    "field": "what",
                    "type": "nominal",
                    "title": None,
                    "scale": {"domain": list(colours), "range": list(colours.values())},
                    "legend": {"orient": "top"},
                },
                "tooltip": [
                    hint("part", "part"),
                    hint("what", "what"),
                    hint("MB", "MB", ",.3f"),
                    hint("bits", "bits a weight", ".3f"),
                    hint("before", "MB before", ",.3f"),
                ],
            },
        },
    )


def _quantized(
    layers: Sequence[Mapping[str, Any]], kinds: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    groups: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in kinds.values()}
    for layer in layers:
        groups[kinds[layer["name"]]].append(layer)
    for kind, group in groups.items():
        elements = sum(math.prod(layer["shape"]) for layer in group)
        before = sum(layer["source_bytes"] for layer in group) / 1e6
        for what, key in ((_CODES, "backbone_bytes"), (_PAIRS, "adapter_bytes")):
            taken = sum(layer[key] for layer in group)
            if taken:
                yield {
                    "part": kind,
                    "what": what,
                    "bytes": taken,
                    "bits": taken * 8 / elements,
                    "before": before,
                }


def _copied(tensors: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    sizes = {
        tensor["name"]: math.prod(tensor["shape"]) * BITS[tensor["dtype"]] // 8
        for tensor in tensors
    }
    least = _NAMED * sum(sizes.values())
    large = sorted((name for name in sizes if sizes[name] >= least), key=lambda n: -sizes[n])
    rest = [name for name in sizes if sizes[name] < least]
    parts = {name: [name] for name in large[:_MOST_NAMED]}
    rest += large[_MOST_NAMED:]
    if rest:
        parts[f"{len(rest)} other tensors"] = rest
    for part, members in parts.items():
        taken = sum(sizes[name] for name in members)
        yield {"part": part, "what": _KEPT, "bytes": taken, "bits": None, "before": taken / 1e6}


def _sums(values: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for value in values:
        found[value["part"]] = found.get(value["part"], 0) + value["bytes"]
    return found
