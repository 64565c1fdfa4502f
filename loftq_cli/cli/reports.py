"""What ``loftq inspect`` and ``loftq error-report`` show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from loftq_cli.cli import console, show


def inspection(found: Mapping[str, Any], *, as_json: bool) -> None:
    """``loftq inspect``."""
    if as_json:
        console.json_object(found)
        return
    console.table(
        f"{len(found['layers'])} quantized matrices",
        ("tensor", "shape", "bits", "method", "rank", "layout", "bits/weight", "with adapter"),
        [
            (
                layer["name"],
                console.shape(layer["shape"]),
                str(layer["bits"]),
                layer["method"],
                str(layer["rank"]),
                layer["layout"],
                f"{layer['bits_per_weight']:.3f}",
                f"{layer['bits_per_weight_with_adapter']:.3f}",
            )
            for layer in found["layers"]
        ],
    )
    totals, source = found["totals"], found["source"]
    revision = f" at {source['revision']}" if source["revision"] else ""
    pairs = [
        ("source", f"{source['id']}{revision}"),
        ("made by", f"{found['tool']['name']} {found['tool']['version']}"),
        ("widths", show.kinds(found["layers"])),
        ("parameters", f"{totals['parameters']:,}"),
        ("passed through", f"{found['passed_through']} tensors"),
        ("backbone", show.shrinking(totals)),
        ("adapter", console.size(totals["adapter_bytes"])),
        (
            "bits per weight",
            f"{totals['bits_per_weight']:.3f}, "
            f"{totals['bits_per_weight_with_adapter']:.3f} with the adapter",
        ),
        ("residual", f"{totals['relative_residual']:.4f} of the weights"),
    ]
    if "refined" in found:
        pairs.append(("refined", _refined(found["refined"])))
    if "trained_adapter" in found:
        taken = "not the conversion's own: load(DIR, adapter=…) and merge --adapter take it"
        pairs.append(("trained adapter", f"{found['trained_adapter']}, {taken}"))
    if found["verified_files"] is not None:
        pairs.append(("verified", f"{found['verified_files']} files match the manifest"))
    pairs.append(("needs", show.needs_line(found["needs"])))
    console.pairs(_titled(found), pairs)
    show.loading(found["loading"])


def _refined(told: Mapping[str, Any]) -> str:
    """What a refinement was on, and what came of it on text held out."""
    blocks = [block for block in told["blocks"] if block["held_before"]]
    gains = [block["held_after"] / block["held_before"] for block in blocks]
    found = [f"on {told['tokens']:,} tokens"]
    if gains:
        mean = math.exp(sum(map(math.log, gains)) / len(gains))
        found.append(f"errors of {len(gains)} blocks on text held out times {mean:.3f}")
    if end := told.get("end_to_end"):
        found.append(f"end to end {end['held_before']:.4g} -> {end['held_after']:.4g}")
    return ", ".join(found)


def _titled(report: Mapping[str, Any]) -> str:
    """What a report is on: a directory, or a commit of a repository."""
    repository = report["repository"]
    if repository is None:
        return str(report["directory"])
    return f"{repository['repo_id']} at {repository['revision']}"


def residuals(report: Mapping[str, Any], *, as_json: bool, as_csv: bool) -> None:
    """``loftq error-report``."""
    layers = report["layers"]
    if as_json:
        console.json_object(report)
        return
    if as_csv:
        _csv(layers)
        return
    _residuals_table(report)
    totals = report["totals"]
    console.pairs(
        _titled(report),
        [
            ("without adapter", f"{totals['relative_residual_quantized']:.4f}"),
            ("with adapter", f"{totals['relative_residual']:.4f}"),
            ("worst layers", ", ".join(report["worst"])),
        ],
    )
    if "refined" in report:
        _show_refined(report["refined"])
    if "weighted_residual" in totals:
        _show_weighted(report)


def _steps(layers: Sequence[Mapping[str, Any]]) -> int:
    return max((len(layer["steps"]) for layer in layers), default=0)


def _csv(layers: Sequence[Mapping[str, Any]]) -> None:
    """A row per layer."""
    fields = ("name", "bits", "rank", "step", "weight", "quantized", "final")
    relative = ("relative_residual_quantized", "relative_residual")
    weighted = ("kind", "weight", "quantized", "final")
    header = [*fields, *relative, *(f"weighted_{name}" for name in weighted)]
    rows = [
        [
            *(layer[name] for name in fields + relative),
            *((layer["weighted"] or {}).get(name, "") for name in weighted),
            *layer["steps"],
        ]
        for layer in layers
    ]
    columns = [f"step_{number}" for number in range(1, _steps(layers) + 1)]
    console.csv_rows([*header, *columns], rows)


def _residuals_table(report: Mapping[str, Any]) -> None:
    layers = report["layers"]
    steps = _steps(layers)
    title = "Frobenius residuals" + (", recomputed from the source" if report["recomputed"] else "")
    columns = [f"step {number}" for number in range(1, steps + 1)]
    console.table(
        f"{title} (relative to the weights, but for the absolute one)",
        ("tensor", "absolute", "no adapter", *columns, "final", "final/no adapter"),
        [
            (
                layer["name"],
                f"{layer['final']:.4f}",
                f"{layer['relative_residual_quantized']:.4f}",
                *(f"{value / (layer['weight'] or 1):.4f}" for value in layer["steps"]),
                f"{layer['relative_residual']:.4f}",
                f"{layer['ratio']:.3f}",
            )
            for layer in layers
        ],
    )


def _show_refined(told: Mapping[str, Any]) -> None:
    parts = [*told["blocks"], *([told["end_to_end"]] if "end_to_end" in told else [])]
    shown = [
        [part["name"], *("-" if part[key] is None else f"{part[key]:.5f}" for key in _LOSSES)]
        for part in parts
    ]
    console.table(
        "\nRefined: the loss of each part, before and after, and of text held out",
        ("part", "before", "after", "held out", "after", "kept"),
        [[*row, f"{part['kept']}/{part['steps']}"] for row, part in zip(shown, parts, strict=True)],
    )
    console.line(
        "Refining makes outputs alike, not weights: it raises the plain residual, and lowers what "
        "`loftq evaluate` measures."
    )


_LOSSES = ("before", "after", "held_before", "held_after")


def _show_weighted(report: Mapping[str, Any]) -> None:
    layers, totals = report["layers"], report["totals"]
    console.table(
        "\nWeighted residuals, of the layers' outputs (relative)",
        ("tensor", "statistics", "no adapter", "final"),
        [
            (
                layer["name"],
                layer["weighted"]["kind"],
                f"{layer['weighted']['quantized'] / (layer['weighted']['weight'] or 1):.4f}",
                f"{layer['weighted']['final'] / (layer['weighted']['weight'] or 1):.4f}",
            )
            for layer in layers
            if layer["weighted"] is not None
        ],
    )
    console.pairs(
        "weighted",
        [
            ("without adapter", f"{totals['weighted_residual_quantized']:.4f}"),
            ("with adapter", f"{totals['weighted_residual']:.4f}"),
        ],
    )
    console.line(
        "The plain residual says how near the weights are; the weighted one how near the outputs "
        "are on text like that measured. Neither is the model's score."
    )
