"""A plan as ``--dry-run --json`` shows it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from loftq_cli.layouts.needs import needs
from loftq_cli.planning.download import planned_download
from loftq_cli.planning.memory import memory_bytes
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.target import headroom


def describe(plan: Plan, output: Path) -> dict[str, Any]:
    """What would be selected and passed through, why, and what it would take.

    Where a target has yet to settle a width, figures of that matrix are None, and sums the most
    that they can be.
    """
    added = headroom(plan)
    elements = sum(item.matrix.elements for item in plan.matrices.values())
    sizes = {tensor.name: tensor.nbytes for tensor in plan.selection.matrices}
    download = planned_download(plan.source)
    existing = next(path for path in (output, *output.parents) if path.exists())
    return {
        "source": {"id": plan.source.id, "revision": plan.source.revision},
        "output": str(output),
        "recipe": plan.recipe.as_dict(),
        "fingerprint": plan.fingerprint,
        "selected": [
            {
                "name": name,
                "shape": list(item.matrix.shape),
                "dtype": item.matrix.dtype,
                "method": plan.recipe.method if name in plan.unsettled else item.matrix.method,
                "bits": None if name in plan.unsettled else item.matrix.bits,
                "rank": item.rank,
                "layout": plan.layout.name,
                "bits_per_weight": None if name in plan.unsettled else item.bits_per_weight,
                "source_bytes": sizes[name],
                "backbone_bytes": None
                if name in plan.unsettled
                else sum(spec.nbytes for spec in item.specs),
                "reason": plan.selection.reasons[name],
            }
            for name, item in plan.matrices.items()
        ],
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
