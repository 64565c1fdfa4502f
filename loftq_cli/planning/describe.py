"""A plan as ``--dry-run --json`` shows it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.dtypes import BITS
from loftq_cli.layouts.needs import needs
from loftq_cli.planning.download import planned_download
from loftq_cli.planning.memory import memory_bytes
from loftq_cli.planning.plan import Plan, PlannedMatrix
from loftq_cli.planning.target import headroom


def describe(plan: Plan, output: Path) -> dict[str, Any]:
    """What would be selected and passed through, why, and what it would take.

    Where a target has yet to settle a width, figures of that matrix are None, and sums the most
    that they can be.
    """
    added = headroom(plan)
    elements = sum(item.matrix.elements for item in plan.matrices.values())
    download = planned_download(plan.source)
    existing = next(path for path in (output, *output.parents) if path.exists())
    return {
        "source": {"id": plan.source.id, "revision": plan.source.revision},
        "output": str(output),
        "recipe": plan.recipe.as_dict(),
        "fingerprint": plan.fingerprint,
        "selected": [_selected(plan, name, item) for name, item in plan.matrices.items()],
        "passed_through": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "bytes": tensor.nbytes,
                "reason": reason,
            }
            for tensor, reason in plan.selection.kept
        ],
        "totals": {
            "parameters": plan.parameters,
            "source_bytes": plan.source_bytes,
            "backbone_bytes": plan.backbone_bytes + added,
            "adapter_bytes": plan.adapter_bytes,
            "bits_per_weight": plan.bits_per_weight + added * 8 / elements,
        },
        "left_behind": list(plan.source.left_behind),
        "memory_bytes": memory_bytes(plan),
        "disk_bytes": plan.disk_bytes + added,
        "download": {
            "files": download.files,
            "bytes": download.nbytes,
            "disk_bytes": download.disk_bytes,
            "directory": download.directory and str(download.directory),
        },
        "free_disk_bytes": shutil.disk_usage(existing).free,
        "needs": needs(plan.layout.name),
    }


def _selected(plan: Plan, name: str, item: PlannedMatrix) -> dict[str, Any]:
    matrix, settled = item.matrix, name not in plan.unsettled
    return {
        "name": name,
        "shape": list(matrix.shape),
        "dtype": matrix.dtype,
        "method": matrix.method if settled else plan.recipe.method,
        "bits": matrix.bits if settled else None,
        "rank": item.rank,
        "layout": plan.layout.name,
        "bits_per_weight": item.bits_per_weight if settled else None,
        "source_bytes": matrix.elements * BITS[matrix.dtype] // 8,
        "backbone_bytes": sum(spec.nbytes for spec in item.specs) if settled else None,
        "reason": plan.selection.reasons[name],
    }
