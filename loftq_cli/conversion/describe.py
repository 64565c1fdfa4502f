"""A plan as ``--dry-run --json`` shows it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from loftq_cli.conversion.plan import Plan


def describe(plan: Plan, output: Path) -> dict[str, Any]:
    """What would be selected and passed through, why, and what it would take."""
    sizes = {tensor.name: tensor.nbytes for tensor in plan.selection.matrices}
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
                "method": item.matrix.method,
                "bits": item.matrix.bits,
                "rank": item.rank,
                "layout": plan.layout.name,
                "bits_per_weight": item.bits_per_weight,
                "source_bytes": sizes[name],
                "backbone_bytes": sum(spec.nbytes for spec in item.specs),
                "reason": "asked for by --include"
                if name in plan.selection.included
                else "linear layer of a block",
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
            "backbone_bytes": plan.backbone_bytes,
            "adapter_bytes": plan.adapter_bytes,
            "bits_per_weight": plan.bits_per_weight,
        },
        "memory_bytes": plan.memory_bytes,
        "disk_bytes": plan.disk_bytes,
        "free_disk_bytes": shutil.disk_usage(existing).free,
    }
