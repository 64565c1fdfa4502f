"""The manifest: what was converted, how, and how close it came (docs/output-format.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.checkpoint.output import file_entries, relative
from loftq_cli.numerics.decomposition import Adapted
from loftq_cli.planning.plan import Plan, PlannedMatrix
from loftq_cli.version import VERSION

FORMAT_VERSION = 1


def matrix_record(
    item: PlannedMatrix, layout: str, result: Adapted, kind: str | None
) -> dict[str, Any]:
    """The manifest's entry for one matrix; ``kind`` of its statistics, if it has any."""
    matrix = item.matrix
    weighted = {}
    if result.weighted is not None:
        weighted["weighted"] = {"kind": kind, **asdict(result.weighted)}
    return {
        "name": matrix.name,
        "module": matrix.module,
        "shape": list(matrix.shape),
        "dtype": matrix.dtype,
        "method": matrix.method,
        "bits": matrix.bits,
        "block_size": matrix.block_size,
        "rank": item.rank,
        "layout": layout,
        "bits_per_weight": item.bits_per_weight,
        "step": result.step,
        "frobenius": asdict(result.frobenius),
        **weighted,
        **({} if matrix.kind == "linear" else {"kind": matrix.kind}),
        **({} if matrix.in_memory is None else {"in_memory": matrix.in_memory}),
        **({} if matrix.cut is None else {"cut": asdict(matrix.cut)}),
        **({} if matrix.held is None else {"held": matrix.held.as_dict()}),
    }


def build(
    plan: Plan,
    records: Sequence[Mapping[str, Any]],
    source_hashes: Mapping[str, str],
    output: Path,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest of the finished files in ``output``."""
    source = plan.source
    small = [source.config] + ([source.index] if source.index else [])
    files = [
        {"name": shard.name, "size": shard.header.size, "sha256": source_hashes[shard.name]}
        for shard in source.shards
    ] + [{"name": file.name, "size": file.size, "sha256": file.sha256} for file in small]
    origin: dict[str, Any] = {"id": source.id, "revision": source.revision}
    if source.encoded:
        origin["encoded"] = list(source.encoded)
    if source.resolved_from is not None:
        origin["resolved_from"] = source.resolved_from
    return {
        "format_version": FORMAT_VERSION,
        "tool": {"name": "loftq-cli", "version": VERSION},
        "source": {**origin, "files": sorted(files, key=lambda file: str(file["name"]))},
        "recipe": plan.recipe.as_dict(),
        **({} if plan.given is None else {"backbone": plan.given.described()}),
        "fingerprint": plan.fingerprint,
        "matrices": list(records),
        "passed_through": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "dtype": _dtype(plan, tensor),
                "reason": reason,
                **_renamed(plan.anatomy.names, tensor.name),
            }
            for tensor, reason in plan.selection.kept
        ],
        "totals": {
            "parameters": plan.parameters,
            "source_bytes": plan.source_bytes,
            "backbone_bytes": plan.backbone_bytes,
            "adapter_bytes": plan.adapter_bytes,
            "bits_per_weight": plan.bits_per_weight,
            "relative_residual": relative(records, "final"),
            "relative_residual_quantized": relative(records, "quantized"),
        },
        "outputs": file_entries(output, plan.recipe.threads),
        "environment": dict(environment),
    }


def _dtype(plan: Plan, tensor: StoredTensor) -> str:
    """Of a tensor that is not quantized: a backbone that is given has it in its own."""
    other = plan.pairs.get(tensor.name)
    if plan.given is None or other is None or plan.given.is_quantized(other):
        return tensor.dtype
    return other.dtype


def described(record: Mapping[str, Any]) -> str:
    """A matrix's entry as a line for people."""
    norms = record["frobenius"]
    left = norms["final"] / (norms["weight"] or 1.0)
    return f"{record['name']}: converted, residual {left:.4f} of the weight, step {record['step']}"


def _renamed(names: Mapping[str, str], name: str) -> dict[str, str]:
    return {"in_memory": names[name]} if name in names else {}
