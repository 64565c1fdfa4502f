"""What ``loftq inspect`` and ``loftq error-report`` show."""

from __future__ import annotations

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
    if "trained_adapter" in found:
        taken = "not the conversion's own: load(DIR, adapter=…) and merge --adapter take it"
        pairs.append(("trained adapter", f"{found['trained_adapter']}, {taken}"))
    if found["verified_files"] is not None:
        pairs.append(("verified", f"{found['verified_files']} files match the manifest"))
    pairs.append(("needs", show.needs_line(found["needs"])))
    console.pairs(_titled(found), pairs)
    show.loading(found["loading"])


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
