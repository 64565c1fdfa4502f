"""``loftq export``: the codes of a conversion in another layout, nothing computed anew.

What cannot be moved exactly is refused. One matrix is in memory at a time; an export that was
interrupted is begun anew.
"""

from __future__ import annotations

import copy
import hashlib
import time
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.companions import copy_files
from loftq_cli.checkpoint.output import MANIFEST, file_entries, open_output, verify
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.checkpoint.source import CONFIG, INDEX, open_source
from loftq_cli.checkpoint.writer import GrowingShard, index_of
from loftq_cli.errors import UsageError
from loftq_cli.exporting.adapter import ExportedAdapter, exported
from loftq_cli.exporting.plan import ExportPlan, Kept, Moved, make_export_plan, specs_of
from loftq_cli.layouts import adapter as adapters
from loftq_cli.machine.durable import explained, pretty_json, write_file
from loftq_cli.machine.observer import Observer
from loftq_cli.machine.paths import check_output_path
from loftq_cli.machine.resources import check_space, memory_explained
from loftq_cli.machine.workspace import Workspace

TRAINED = "adapter"
"""The folder of an export that holds the adapter of --adapter."""
_MARGIN = 4 << 20  # room for config and manifest


class ExportWorkspace(Workspace):
    """The life of an export; there is no journal, what is interrupted is begun anew."""

    suffix = "loftq-export"
    marker = MANIFEST
    kind = "a conversion"
    doing = "exporting to"


def export(
    directory: Path,
    output: Path,
    layout: str,
    *,
    adapter: Path | None = None,
    pad_ranks: bool = False,
    base_model: str | None = None,
    overwrite: bool = False,
    observer: Observer,
) -> dict[str, Any]:
    """Write the conversion in ``directory`` to ``output`` in ``layout``.

    ``adapter``, which training saved, goes to the folder ``adapter`` of it; ``pad_ranks`` gives
    every pair of the adapters one rank, by zeros; ``base_model`` is what their configs call the
    backbone, None the output's own path. Returns what ``--json`` prints. Raises VerificationError
    if ``directory`` was altered, LayoutError if the layout cannot hold the very same values,
    InputError for an adapter of something else, UsageError, OutputConflictError,
    EnvironmentFailure.
    """
    started = time.monotonic()
    found = open_output(directory)
    verify(found)
    final = check_output_path(output, directory)
    plan = make_export_plan(found, open_source(directory), layout)
    taken = [(directory / adapters.DIRECTORY, adapters.DIRECTORY)]
    taken += [] if adapter is None else [(adapter, TRAINED)]
    pairs = [exported(found, file, to, plan.matrices, pad=pad_ranks) for file, to in taken]
    if adapter is not None and final in (adapter.resolve(), *adapter.resolve().parents):
        raise UsageError(f"--output {output} holds the adapter {adapter}", hint="choose another")
    workspace = ExportWorkspace(final)
    adapter_bytes = sum(each.nbytes for each in pairs)
    check_space(final.parent, plan.disk_bytes + adapter_bytes + _MARGIN - workspace.written())
    workspace.check_permissions()
    with workspace.locked():
        workspace.refuse_other_output(overwrite)
        workspace.discard_work()  # what a crash left
        _write(plan, pairs, workspace.output, base_model or str(final), observer)
        workspace.publish(overwrite)
    return {
        "adapter": None if adapter is None else str(output / TRAINED),
        "bytes": plan.tensor_bytes,
        "directory": str(directory),
        "from": sorted({record["layout"] for record in found.records}),
        "layout": layout,
        "matrices": len(plan.matrices),
        "output": str(output),
        "rank": pairs[0].rank,
        "seconds": round(time.monotonic() - started, 3),
    }


def _write(
    plan: ExportPlan, pairs: list[ExportedAdapter], target: Path, base: str, observer: Observer
) -> None:
    """Write every file of the result to ``target``."""
    with explained(target):
        target.mkdir()
    observer.begin(plan.tensor_bytes, "exporting")
    try:
        for name, items in plan.shards:
            with GrowingShard(target / name, specs_of(items)) as shard:
                for item in items:
                    _write_item(plan, item, shard, observer)
                shard.sync()
    finally:
        observer.end()
    if len(plan.shards) > 1:
        write_file(
            target / INDEX,
            pretty_json(index_of((name, specs_of(items)) for name, items in plan.shards)),
        )
    copy_files(_companions(plan), target)
    entry = {} if plan.entry is None else {"quantization_config": plan.entry}
    write_file(target / CONFIG, pretty_json({**plan.config, **entry}, in_order=True))
    for each in pairs:
        with explained(target):
            each.write(target, base, transposed=plan.transposed)
    with explained(target):
        manifest = _manifest(plan, pairs[0], target)
    write_file(target / MANIFEST, pretty_json(manifest))


def _write_item(
    plan: ExportPlan, item: Kept | Moved, shard: GrowingShard, observer: Observer
) -> None:
    if isinstance(item, Kept):
        observer.working_on(item.tensor.name)
        with TensorFile(item.file) as file:
            shard.write_pieces(item.tensor.name, file.pieces(item.tensor))
    else:
        name = item.matrix.name
        observer.working_on(name)
        with memory_explained(f"tensor {name!r}", hint="free memory for copies of this matrix"):
            for part, tensor in item.encoded(plan.output.directory, plan.stored).items():
                shard.write(part, tensor)
    observer.advance(sum(spec.nbytes for spec in item.specs))


def _companions(plan: ExportPlan) -> dict[str, Path]:
    """Files that are copied as they are, by name."""
    directory = plan.output.directory
    written = {CONFIG, INDEX, *(name for name, _ in plan.shards)}
    names = [entry["name"] for entry in plan.output.manifest["outputs"]]
    left_out = (f"{adapters.DIRECTORY}/", f"{TRAINED}/")
    return {
        name: directory / name
        for name in names
        if name not in written and not name.startswith(left_out)
    }


def _manifest(plan: ExportPlan, start: ExportedAdapter, target: Path) -> dict[str, Any]:
    """The conversion's manifest, of other files. The recipe stays what was asked for: residuals
    are those of the codes that it led to."""
    manifest = copy.deepcopy(plan.output.manifest)
    for record, matrix in zip(manifest["matrices"], plan.matrices, strict=True):
        bits = 8 * sum(spec.nbytes for spec in plan.layout.specs(matrix))
        record |= {"layout": plan.layout.name, "bits_per_weight": bits / matrix.elements}
        if start.rank is not None:
            record["rank"] = start.rank
    elements = sum(matrix.elements for matrix in plan.matrices)
    stored = sum(s.nbytes for matrix in plan.matrices for s in plan.layout.specs(matrix))
    manifest["totals"] |= {
        "backbone_bytes": plan.tensor_bytes,
        "adapter_bytes": start.nbytes,
        "bits_per_weight": 8 * stored / elements,
    }
    origin = plan.output.origin
    manifest["exported"] = {"fingerprint": origin}
    told = f"{origin} {plan.layout.name} {start.rank}"
    manifest["fingerprint"] = hashlib.sha256(told.encode()).hexdigest()
    manifest["outputs"] = file_entries(target)
    return manifest
