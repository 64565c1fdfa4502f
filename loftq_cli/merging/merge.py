"""``loftq merge``: a backbone and an adapter, trained or not, to an ordinary checkpoint.

Every quantized matrix becomes one tensor, Q + scaling * B A, computed in float32 as PEFT does and
rounded once; all other tensors are copied. One matrix is in memory at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.companions import copy_files
from loftq_cli.checkpoint.dtypes import tag_named
from loftq_cli.checkpoint.output import open_output, require_backbone
from loftq_cli.checkpoint.reader import TensorFile, pieces_of
from loftq_cli.checkpoint.source import CONFIG, INDEX, open_source
from loftq_cli.checkpoint.writer import GrowingShard, index_of
from loftq_cli.errors import UsageError, listed
from loftq_cli.layouts import adapter as adapters
from loftq_cli.layouts.trained import TrainedAdapter, open_adapter
from loftq_cli.loading.intact import check_start
from loftq_cli.loading.trained_beside import beside_the_start
from loftq_cli.machine.durable import explained, pretty_json, write_file
from loftq_cli.machine.observer import Observer
from loftq_cli.machine.paths import check_output_path
from loftq_cli.machine.resources import check_memory, check_space, memory_explained
from loftq_cli.machine.workspace import Workspace
from loftq_cli.merging.config import dtype_name, merged_config, provenance, snippet
from loftq_cli.merging.plan import Copied, Merged, MergePlan, Stacked, make_merge_plan, parts_of
from loftq_cli.merging.value import merged_value

MARKER = "loftq_merge.json"
_MARGIN = 4 << 20  # room for config and the marker


class MergeWorkspace(Workspace):
    """The life of a merged checkpoint; there is no journal, what is interrupted is begun anew."""

    suffix = "loftq-merge"
    marker = MARKER
    kind = "a merged checkpoint"
    doing = "converting to"


def merge(
    directory: Path,
    output: Path,
    *,
    adapter: Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    observer: Observer,
) -> dict[str, Any]:
    """Merge the conversion in ``directory`` with ``adapter`` (None: its own) into ``output``.

    ``dtype`` is that of the merged matrices, None the one they had before the conversion. Returns
    what ``--json`` prints. Raises InputError if backbone or adapter are damaged or do not belong
    together, VerificationError if ``adapter`` is None and training replaced the conversion's,
    UsageError if it has none, for an output inside the input or a dtype that cannot hold a value,
    OutputConflictError, EnvironmentFailure.
    """
    started = time.monotonic()
    found = open_output(directory)
    require_backbone(found)
    own = directory / adapters.DIRECTORY
    if adapter is None and not found.has_adapter:
        raise UsageError(
            f"{directory} has no adapter: one was merged into its codes",
            hint="name another one with --adapter, or `loftq export --layout dense`",
        )
    trained = open_adapter(own if adapter is None else adapter)
    if adapter is None:
        check_start(found, f"merged with --adapter {own}")
    final = check_output_path(output, directory)
    _keep_adapter(output, final, trained)
    plan = make_merge_plan(found, open_source(directory), trained, dtype and tag_named(dtype))
    _remark(plan, observer)
    _remark_on_trained(None if adapter else directory, observer)
    workspace = MergeWorkspace(final)
    if overwrite or not workspace.is_taken():
        _check_room(plan, workspace)
    with workspace.locked():
        workspace.refuse_other_output(overwrite)
        workspace.discard_work()  # what a crash left
        _write(plan, workspace.output, observer)
        workspace.publish(overwrite)
    return {
        "adapter": str(trained.file),
        "added": _added(plan),
        "bytes": plan.tensor_bytes,
        "directory": str(directory),
        "dtype": dtype_name(plan.dtype),
        "loading": snippet(plan, output),
        "matrices": len(plan.merged),
        "output": str(output),
        "replaced": sorted(plan.replaced),
        "seconds": round(time.monotonic() - started, 3),
        "without_adapter": _without_adapter(plan),
    }


def _check_room(plan: MergePlan, workspace: Workspace) -> None:
    """Raise EnvironmentFailure if disk, memory or permissions are not enough."""
    with explained(plan.output.directory):
        copied = sum(path.stat().st_size for path in plan.companions.values())
    needed = plan.disk_bytes + copied + _MARGIN - workspace.written()
    check_space(workspace.final.parent, needed)
    workspace.check_permissions()
    largest = max(plan.merged, key=lambda item: item.spec.elements)
    in_float32 = 2 * 4 * largest.spec.elements  # the matrix and the product
    check_memory(in_float32, f"tensor {largest.spec.name!r}", torch.device("cpu"))


def _keep_adapter(output: Path, final: Path, trained: TrainedAdapter) -> None:
    """Raise UsageError if --overwrite would delete the adapter with the old output."""
    home = trained.file.resolve().parent
    if final == home or final in home.parents:
        raise UsageError(
            f"--output {output} holds the adapter {trained.file}", hint="choose another directory"
        )


def _remark(plan: MergePlan, observer: Observer) -> None:
    bare = _without_adapter(plan)
    if bare:
        observer.note(f"the adapter has nothing for {listed(bare, 1)}: merged as quantized")
    if plan.added:
        observer.note(f"the adapter brings {', '.join(_added(plan))}")


def _remark_on_trained(directory: Path | None, observer: Observer) -> None:
    left = directory and beside_the_start(directory)
    if left is not None:
        observer.note(
            f"{left} holds a trained adapter, and the start in {adapters.DIRECTORY} is merged: "
            f"--adapter {left} takes the trained one"
        )


def _without_adapter(plan: MergePlan) -> list[str]:
    return sorted(
        item.spec.name
        for item in plan.merged
        if item.weight.pair is None and item.weight.is_quantized
    )


def _added(plan: MergePlan) -> list[str]:
    return sorted(spec.name for spec in plan.added)


def _write(plan: MergePlan, target: Path, observer: Observer) -> None:
    """Write every file of the result to ``target``."""
    with explained(target):
        target.mkdir()
    observer.begin(plan.tensor_bytes, "merging")
    try:
        for name, items in plan.shards:
            with GrowingShard(target / name, [item.spec for item in items]) as shard:
                for item in items:
                    _write_tensor(plan, item, shard, observer)
                shard.sync()
    finally:
        observer.end()
    if len(plan.shards) > 1:
        index = index_of((name, [item.spec for item in items]) for name, items in plan.shards)
        write_file(target / INDEX, pretty_json(index))
    copy_files(plan.companions, target)
    write_file(target / CONFIG, pretty_json(merged_config(plan), in_order=True))
    write_file(target / MARKER, pretty_json(provenance(plan)))


def _write_tensor(
    plan: MergePlan, item: Copied | Merged | Stacked, shard: GrowingShard, observer: Observer
) -> None:
    observer.working_on(item.spec.name)
    if isinstance(item, Copied):
        with TensorFile(item.file) as file:
            shard.write_pieces(item.spec.name, file.pieces(item.tensor))
        observer.advance(item.spec.nbytes)
        return
    writer = shard.tensor(item.spec.name)
    turned = isinstance(item, Stacked) and item.transposed
    for matrix in parts_of(item):
        for piece in _pieces(plan, matrix, turned=turned):
            writer.append(piece)
        observer.advance(matrix.spec.nbytes)


def _pieces(plan: MergePlan, item: Copied | Merged, *, turned: bool) -> Iterator[memoryview]:
    """The bytes of the value of ``item``, transposed if it is ``turned``."""
    hint = "free memory for several float32 copies of this matrix"
    with memory_explained(f"tensor {item.spec.name!r}", hint=hint):
        if isinstance(item, Copied):
            with TensorFile(item.file) as file:
                value = file.read(item.tensor)
        else:
            value = merged_value(plan, item)
    yield from pieces_of(value.T if turned else value)
