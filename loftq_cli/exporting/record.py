"""The manifest of an export: the conversion's, of other files."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.output import file_entries, relative
from loftq_cli.exporting.adapter import ExportedAdapter
from loftq_cli.exporting.plan import ExportPlan
from loftq_cli.exporting.requantize import distances


def export_manifest(
    plan: ExportPlan,
    start: ExportedAdapter | None,
    changed: Mapping[str, Mapping[str, Any]],
    merged: Mapping[str, Any] | None,
    fingerprint: str,
    target: Path,
) -> dict[str, Any]:
    """The manifest of the finished files in ``target``. The recipe stays what was asked for:
    residuals are those of the codes that it led to. ``changed``: of matrices that were quantized
    again, what their entries say now; ``merged``: what they were merged with."""
    manifest = copy.deepcopy(plan.output.manifest)
    elements = stored = 0
    for record, matrix in zip(manifest["matrices"], plan.matrices, strict=True):
        bits = 8 * sum(spec.nbytes for spec in plan.layout.specs(matrix))
        elements, stored = elements + matrix.elements, stored + bits
        record |= {"layout": plan.layout.name, "bits_per_weight": bits / matrix.elements}
        if start is not None and start.rank is not None:
            record["rank"] = start.rank
        if merged is not None:
            record.pop("weighted", None)
            record |= {key: value for key, value in changed[matrix.name].items() if key != "moved"}
    manifest["totals"] |= {
        "backbone_bytes": plan.tensor_bytes,
        "adapter_bytes": 0 if start is None else start.nbytes,
        "bits_per_weight": stored / elements,
    }
    manifest["exported"] = {"fingerprint": plan.output.origin}
    if merged is not None:
        manifest["passed_through"] = _kept(plan, manifest["passed_through"])
        records = manifest["matrices"]
        manifest["totals"] |= {
            "relative_residual": relative(records, "final"),
            "relative_residual_quantized": relative(records, "quantized"),
        }
        manifest["exported"]["merged"] = {**merged, **distances(list(changed.values()))}
    manifest["fingerprint"] = fingerprint
    manifest["outputs"] = file_entries(target)
    return manifest


def _kept(plan: ExportPlan, before: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries of tensors that are not quantized, of which training may have added some."""
    known = {entry["name"]: entry for entry in before}
    new = {"reason": "trained in full"}
    return [
        {
            **known.get(spec.name, {"name": spec.name, **new}),
            "shape": list(spec.shape),
            "dtype": spec.dtype,
        }
        for spec in plan.kept
    ]
