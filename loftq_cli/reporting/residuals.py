"""``loftq error-report``: how far Q + BA is from W, per layer.

The manifest's figures, or, given the original checkpoint, figures recomputed from the packed bytes
and the original weights, with which the manifest must then agree.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from loftq_cli.checkpoint.locate import Place
from loftq_cli.checkpoint.output import Output, open_output
from loftq_cli.errors import UsageError, VerificationError
from loftq_cli.machine.paths import expanded
from loftq_cli.reporting.recompute import Recomputed, Weighted, recompute
from loftq_cli.reporting.summary import together

WORST = 5
"""How many layers are listed as the worst."""

_TOLERANCE = 1e-4
_ROUNDING = 1e-6
"""What recomputing on another machine may differ by: of the figure, and of the weight's norm."""
_WEIGHTED_TOLERANCE, _WEIGHTED_ROUNDING = 3e-3, 1e-4  # products with H may be in bfloat16


def error_report(
    place: Place,
    source: str | None = None,
    stats: str | os.PathLike[str] | None = None,
    *,
    offline: bool = False,
) -> dict[str, Any]:
    """Per-layer residuals, totals and the worst layers.

    With ``source`` every residual but the intermediate steps' is recomputed; weighted ones with
    ``stats`` beside it, of a conversion without statistics too. ``offline``: a
    source on the hub is taken from the hub cache. Raises UsageError for ``stats`` alone, InputError
    for a source of another model or other statistics than were converted with, and
    VerificationError, with every matrix concerned, if the manifest disagrees.
    """
    if stats is not None and source is None:
        raise UsageError("--stats needs --source", hint="name the original checkpoint as well")
    output = open_output(place.directory)
    recomputed = None
    if source is not None:
        file = None if stats is None else str(expanded(stats))
        recomputed = recompute(output, source, file, offline=offline)
    layers = []
    for record in output.records:
        stated = record["frobenius"]
        norms, weighted = (
            (Recomputed(stated["weight"], stated["quantized"], stated["final"]), None)
            if recomputed is None
            else recomputed[record["name"]]
        )
        layers.append(_layer(record, norms, weighted))
    if recomputed is not None:
        _compare(output, layers)
    totals = _totals(layers)
    outputs = [layer["weighted"] for layer in layers if layer["weighted"] is not None]
    if outputs:
        totals["weighted_residual_quantized"] = together(outputs, "quantized")
        totals["weighted_residual"] = together(outputs, "final")
    worst = sorted(layers, key=lambda layer: -layer["relative_residual"])[:WORST]
    return {
        "directory": str(place.directory),
        "repository": place.repository and asdict(place.repository),
        "source": source,
        "stats": None if stats is None else str(stats),
        "recomputed": recomputed is not None,
        **({"refined": output.manifest["refined"]} if "refined" in output.manifest else {}),
        "layers": layers,
        "totals": totals,
        "worst": [layer["name"] for layer in worst],
    }


def _compare(output: Output, layers: Sequence[Mapping[str, Any]]) -> None:
    """Raise VerificationError if the manifest disagrees with the recomputed ``layers``, or with
    itself."""
    wrong = []
    for record, layer in zip(output.records, layers, strict=True):
        stated = record["frobenius"]
        figures = {name: (stated[name], layer[name]) for name in ("weight", "quantized", "final")}
        if record["step"] > 0:
            kept = stated["steps"][record["step"] - 1 : record["step"]]
            figures[f"step {record['step']}"] = (kept[0] if kept else math.nan, layer["final"])
        if "weighted" in record:
            names = ("weight", "quantized", "final")
            pairs = {f"weighted {n}": (record["weighted"][n], layer["weighted"][n]) for n in names}
            rounding = _WEIGHTED_ROUNDING * layer["weighted"]["weight"]
            faults = _differences(pairs, rounding, _WEIGHTED_TOLERANCE)
            wrong += [f"{record['name']}: {fault}" for fault in faults]
        rounding = _ROUNDING * layer["weight"]
        wrong += [f"{record['name']}: {fault}" for fault in _differences(figures, rounding)]
    stated = output.manifest["totals"]
    figures = {name: (stated[name], value) for name, value in _totals(layers).items()}
    wrong += [f"totals: {fault}" for fault in _differences(figures, _ROUNDING)]
    if wrong:
        raise VerificationError(f"{output.directory}: the manifest disagrees: " + "; ".join(wrong))


def _differences(
    figures: Mapping[str, tuple[float, float]], rounding: float, tolerance: float = _TOLERANCE
) -> list[str]:
    """What differs in (stated, recomputed) ``figures`` by more than rounding explains."""
    return [
        f"{name} {actual:.6g}, the manifest says {stated:.6g}"
        for name, (stated, actual) in figures.items()
        if not abs(stated - actual) <= tolerance * actual + rounding  # NaN differs
    ]


def _totals(layers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        "relative_residual": together(layers, "final"),
        "relative_residual_quantized": together(layers, "quantized"),
    }


def _layer(
    record: Mapping[str, Any], norms: Recomputed, weighted: Weighted | None
) -> dict[str, Any]:
    weight = norms.weight or 1.0
    stated = record.get("weighted")
    return {
        "name": record["name"],
        "shape": record["shape"],
        "bits": record["bits"],
        "rank": record["rank"],
        "step": record["step"],
        "weight": norms.weight,
        "quantized": norms.quantized,
        "steps": record["frobenius"]["steps"],
        "final": norms.final,
        "relative_residual": norms.final / weight,
        "relative_residual_quantized": norms.quantized / weight,
        "ratio": norms.final / norms.quantized if norms.quantized else 1.0,
        "weighted": stated
        if weighted is None
        else {**asdict(weighted), "steps": stated["steps"] if stated else []},
    }
