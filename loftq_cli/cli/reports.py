"""What ``loftq inspect`` and ``loftq error-report`` show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from loftq_cli.cli import console, show
from loftq_cli.cli.overview import gains, overview
from loftq_cli.reporting.rows import figure, rows_of
from loftq_cli.reporting.summary import has_adapter


def inspection(found: Mapping[str, Any], *, as_json: bool, every: bool) -> None:
    """``loftq inspect``; with ``every`` a row for each matrix."""
    if as_json:
        console.json_object(found)
        return
    totals, source = found["totals"], found["source"]
    adapter = has_adapter(found["layers"])
    revision = f" at {source['revision']}" if source["revision"] else ""
    pairs = [
        ("source", f"{source['id']}{revision}"),
        ("made by", f"{found['tool']['name']} {found['tool']['version']}"),
        ("matrices", f"{len(found['layers'])}, {show.kinds(found['layers'])}"),
        ("layout", found["layers"][0]["layout"]),
        ("parameters", f"{totals['parameters']:,}"),
        ("passed through", f"{found['passed_through']} tensors"),
        ("backbone", show.shrinking(totals)),
        ("adapter", console.size(totals["adapter_bytes"])),
        (
            "bits per weight",
            f"{totals['bits_per_weight']:.3f}, "
            f"{totals['bits_per_weight_with_adapter']:.3f} with the adapter",
        ),
        ("residual", f"{_residual(totals, 'relative_residual', adapter)} (of the weights)"),
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
    console.line()
    if every:
        _layers_table(found["layers"])
    else:
        overview(found["layers"], adapter=adapter)
        if "refined" in found:
            gains(found["refined"])
        console.line(f"\n{_EVERY}\n")
    show.loading(found["loading"])


_EVERY = "--all lists every matrix"


def _layers_table(layers: Sequence[Mapping[str, Any]]) -> None:
    console.table(
        f"{len(layers)} quantized matrices",
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
            for layer in layers
        ],
    )


def _residual(totals: Mapping[str, Any], name: str, adapter: bool) -> str:
    if not adapter:
        return f"{totals[name]:.4f}"
    return f"{totals[name]:.4f} with the adapter, {totals[f'{name}_quantized']:.4f} without"


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


def residuals(report: Mapping[str, Any], *, as_json: bool, as_csv: bool, every: bool) -> None:
    """``loftq error-report``; with ``every`` a row for each matrix."""
    layers = report["layers"]
    if as_json:
        console.json_object(report)
        return
    if as_csv:
        _csv(layers)
        return
    totals, adapter = report["totals"], has_adapter(layers)
    pairs = [
        ("matrices", f"{len(layers)}{', recomputed from the source' * report['recomputed']}"),
        ("residual", f"{_residual(totals, 'relative_residual', adapter)} (of the weights)"),
    ]
    if "weighted_residual" in totals:
        pairs.append(
            ("weighted", f"{_residual(totals, 'weighted_residual', adapter)} (of the outputs)")
        )
    if "refined" in report:
        pairs.append(("refined", _refined(report["refined"])))
    console.pairs(_titled(report), pairs)
    console.line()
    if every:
        _residuals_table(report)
        if "weighted_residual" in totals:
            _weighted_table(layers)
    else:
        overview(layers, adapter=adapter)
    if "refined" in report:
        _show_refined(report["refined"], every)
    if "weighted_residual" in totals:
        console.paragraph(_NEITHER)
    if not every:
        console.line(f"\n{_EVERY}, --csv and --json their figures")


_NEITHER = (
    "\nThe plain residual says how near the weights are; the weighted one how near the outputs "
    "are on text like that measured. Neither is the model's score."
)


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


def _show_refined(told: Mapping[str, Any], every: bool) -> None:
    """What became of it, part by part, or, unless ``every`` one is asked for, as a strip."""
    if not every:
        gains(told)
    else:
        parts = [*told["blocks"], *([told["end_to_end"]] if "end_to_end" in told else [])]
        console.table(
            "\nRefined: the loss of each part, before and after, and of text held out",
            ("part", "before", "after", "held out", "after", "kept"),
            [
                [
                    part["name"],
                    *("-" if part[key] is None else f"{part[key]:.5f}" for key in _LOSSES),
                    f"{part['kept']}/{part['steps']}",
                ]
                for part in parts
            ],
        )
    console.paragraph(
        "\nRefining makes outputs alike, not weights: it raises the plain residual, and lowers "
        "what `loftq evaluate` measures."
    )


_LOSSES = ("before", "after", "held_before", "held_after")


def _weighted_table(layers: Sequence[Mapping[str, Any]]) -> None:
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


def comparison(found: Mapping[str, Any], *, as_json: bool) -> None:
    """``loftq compare``."""
    if as_json:
        console.json_object(found)
        return
    names = [each["label"] for each in found["conversions"]]
    source = found["source"]
    revision = f" at {source['revision']}" if source["revision"] else ""
    told = f"{len(names)} conversions of {source['id']}{revision}"
    rows = [[title, *cells] for title, cells in rows_of(found)]
    console.compact_table(told, ("", *names), rows)
    kinds = [
        [kind["kind"], *(_median(each) for each in kind["conversions"])] for kind in found["kinds"]
    ]
    console.line()
    console.compact_table("Residuals by kind of layer: medians", ("kind", *names), kinds)
    if len({each["matrices"] for each in found["conversions"]}) > 1:
        console.paragraph(
            f"\nResiduals are of the {found['matrices_in_common']} matrices that all have."
        )


def _median(kind: Mapping[str, Any] | None) -> str:
    return figure(None if kind is None else kind["final"]["median"])
