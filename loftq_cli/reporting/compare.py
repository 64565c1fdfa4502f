"""``loftq compare``: conversions of one model side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loftq_cli.checkpoint.differences import differing_settings
from loftq_cli.checkpoint.locate import Place
from loftq_cli.checkpoint.output import Output, open_output
from loftq_cli.errors import InputError, UsageError
from loftq_cli.reporting import evaluations, summary
from loftq_cli.reporting.inspect import inspect
from loftq_cli.reporting.residuals import error_report
from loftq_cli.reporting.rows import FIGURES

_NO_WEIGHTS = (".json",)  # of a source: config.json and the index may be told in other words
# What follows from other settings, or changes last bits only.
_FOLLOWS = {"widths", "structure", "threads", "kernels"}


@dataclass(frozen=True)
class Compared:
    """One of the conversions that are compared, with all that reports say of it."""

    label: str
    output: Output
    inspection: dict[str, Any]
    report: dict[str, Any]
    evaluations: list[dict[str, Any]]


def gather(places: Sequence[Place]) -> list[Compared]:
    """The conversions in ``places``, checked to be of one model.

    Raises UsageError for fewer than two, InputError if they are of different models, with what
    differs, and what :func:`~loftq_cli.reporting.inspect.inspect` raises.
    """
    if len(places) < 2:
        raise UsageError("one conversion cannot be compared", hint="name two or more")
    found = []
    for place, label in zip(places, labels(places), strict=True):
        output = open_output(place.directory)
        kept = evaluations.of_start(evaluations.saved(output))
        found.append(Compared(label, output, inspect(place), error_report(place), kept))
    first = found[0]
    for other in found[1:]:
        _check(first, other)
    return found


def compare(conversions: Sequence[Compared]) -> dict[str, Any]:
    """What ``--json`` prints of ``conversions`` of one model."""
    names = [{layer["name"] for layer in each.report["layers"]} for each in conversions]
    common = set.intersection(*names)
    return {
        "source": conversions[0].inspection["source"],
        "conversions": [_conversion(each, common) for each in conversions],
        "settings": _settings(conversions),
        "matrices_in_common": len(common),
        "kinds": _kinds(conversions),
        "evaluations": _evaluations(conversions),
    }


def labels(places: Sequence[Place]) -> list[str]:
    """What tells the directories or repositories apart: as few last parts of their names as do."""
    names = [
        str(p.directory if p.repository is None else p.repository.repo_id).rstrip("/")
        for p in places
    ]
    paths = [name.split(os.sep) for name in names]
    for length in range(1, max(map(len, paths), default=1) + 1):
        short = [os.sep.join(path[-length:]) for path in paths]
        if len(set(short)) == len(short):
            return short
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]


def _check(first: Compared, other: Compared) -> None:
    """Raise InputError unless both are of one model."""
    one, two = (_weights(each.output) for each in (first, other))
    if one == two:
        return
    said = f"{first.label} and {other.label} are conversions of different models"
    ids = [each.inspection["source"]["id"] for each in (first, other)]
    of = f"of {ids[0]} and {ids[1]}" if ids[0] != ids[1] else f"both of {ids[0]}, which changed"
    names = sorted({*one, *two}, key=lambda name: (one.get(name) == two.get(name), name))
    told = [f"{names[0]} is {_file(one.get(names[0]))} there, {_file(two.get(names[0]))} here"]
    if (more := sum(one.get(name) != two.get(name) for name in names) - 1) > 0:
        told.append(f"and {more} more files differ")
    raise InputError(f"{said}, {of}: {', '.join(told)}", hint="compare conversions of one model")


def _weights(output: Output) -> dict[str, tuple[int, str]]:
    return {
        file["name"]: (file["size"], file["sha256"])
        for file in output.manifest["source"]["files"]
        if not file["name"].endswith(_NO_WEIGHTS)
    }


def _file(found: tuple[int, str] | None) -> str:
    return "absent" if found is None else f"{found[0]} bytes, sha256 {found[1][:16]}…"


def _conversion(each: Compared, common: set[str]) -> dict[str, Any]:
    totals = each.inspection["totals"]
    layers = [layer for layer in each.report["layers"] if layer["name"] in common]
    outputs = [layer["weighted"] for layer in layers]
    weighted = [found for found in outputs if found is not None] if all(outputs) else []

    def together(of: Sequence[Mapping[str, Any]], which: str) -> float | None:
        return summary.together(of, which) if of else None

    return {
        "label": each.label,
        "directory": each.inspection["directory"],
        "repository": each.inspection["repository"],
        "fingerprint": each.inspection["fingerprint"],
        "layout": each.inspection["layers"][0]["layout"],
        "matrices": len(each.report["layers"]),
        "bits_per_weight": totals["bits_per_weight"],
        "bits_per_weight_with_adapter": totals["bits_per_weight_with_adapter"],
        "backbone_bytes": totals["backbone_bytes"],
        "adapter_bytes": totals["adapter_bytes"],
        "relative_residual": together(layers, "final"),
        "relative_residual_quantized": together(layers, "quantized"),
        "weighted_residual": together(weighted, "final"),
        "refined": "refined" in each.inspection,
        "merged": "merged" in each.output.manifest.get("exported", {}),
    }


def _settings(conversions: Sequence[Compared]) -> dict[str, list[Any]]:
    """Those that differ, with the value of each conversion, null where a manifest does not tell."""
    recipes = [each.output.manifest["recipe"] for each in conversions]
    differing = {name for other in recipes[1:] for name in differing_settings(recipes[0], other)}
    return {name: [recipe.get(name) for recipe in recipes] for name in sorted(differing - _FOLLOWS)}


def _kinds(conversions: Sequence[Compared]) -> list[dict[str, Any]]:
    """Of each kind of layer that any has, what each has of it, null for none."""
    found = [
        {kind.name: kind.as_dict() for kind in summary.kinds(each.report["layers"])}
        for each in conversions
    ]
    names = dict.fromkeys(name for kinds in found for name in kinds)
    return [
        {"kind": name, "conversions": [_without(kinds.get(name)) for kinds in found]}
        for name in names
    ]


def _without(kind: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if kind is None else {k: value for k, value in kind.items() if k != "kind"}


def _evaluations(conversions: Sequence[Compared]) -> list[dict[str, Any]]:
    """Of each text that at least one was evaluated on, the same windows of it: figures of each,
    null for none."""
    found = [{evaluations.key(entry): entry for entry in each.evaluations} for each in conversions]
    keys = dict.fromkeys(key for entries in found for key in entries)
    compared = []
    for key in keys:
        entries = [each.get(key) for each in found]
        known = next(entry for entry in entries if entry is not None)
        told = {name: known[name] for name in ("texts", "source", "samples", "length", "seed")}
        figures = [
            None if entry is None else {name: entry[name] for name in FIGURES} for entry in entries
        ]
        compared.append({**told, "conversions": figures})
    return compared
