"""``loftq export``: the codes of a conversion in another layout, nothing computed anew; or, merged
with a trained adapter, quantized once more.

What cannot be moved exactly is refused. One matrix is in memory at a time. What was interrupted is
gone on with.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.output import Output, open_output, require_backbone, verify
from loftq_cli.checkpoint.source import open_source
from loftq_cli.errors import UsageError
from loftq_cli.exporting.adapter import exported
from loftq_cli.exporting.plan import (
    TRAINED,
    make_export_plan,
)
from loftq_cli.exporting.requantize import Requantizer
from loftq_cli.exporting.work import ExportWorkspace, Wanted, Work
from loftq_cli.layouts import adapter as adapters
from loftq_cli.layouts.registry import make_layout
from loftq_cli.layouts.trained import open_adapter
from loftq_cli.machine.observer import Observer
from loftq_cli.machine.paths import check_output_path
from loftq_cli.machine.resources import check_space
from loftq_cli.merging.plan import make_merge_plan
from loftq_cli.planning.choices import choose_device
from loftq_cli.statistics.file import open_statistics

MOST_SERVED = 512
"""The largest rank that vLLM 0.33 has room for (config/lora.py)."""
_MARGIN = 4 << 20  # room for config and manifest


def export(
    directory: Path, output: Path, wanted: Wanted, *, overwrite: bool = False, observer: Observer
) -> dict[str, Any]:
    """Write the conversion in ``directory`` to ``output`` as it is ``wanted``.

    Returns what ``--json`` prints. Raises VerificationError if ``directory`` was altered,
    LayoutError if the layout cannot hold the very same values, InputError for an adapter of
    something else, StatisticsError, UsageError, OutputConflictError, EnvironmentFailure.
    """
    started = time.monotonic()
    wanted.check()
    found = open_output(directory)
    require_backbone(found)
    verify(found)
    final = check_output_path(output, directory)
    if wanted.adapter is not None and final in _homes(wanted.adapter):
        raise UsageError(
            f"--output {output} holds the adapter {wanted.adapter}", hint="choose another"
        )
    work = _prepared(found, wanted, final, observer)
    _tell_of_ranks(work)
    workspace = ExportWorkspace(final)
    if overwrite or not workspace.is_taken():
        needed = work.plan.disk_bytes + sum(each.nbytes for each in work.pairs) + _MARGIN
        check_space(final.parent, needed - workspace.written())
    workspace.check_permissions()
    with workspace.locked():
        manifest = work.finished(workspace, overwrite) or work.finish(workspace, overwrite)
    return {
        "adapter": str(output / TRAINED) if wanted.adapter and not wanted.merge else None,
        "bytes": work.plan.tensor_bytes,
        "directory": str(directory),
        "from": sorted({record["layout"] for record in found.records}),
        "layout": wanted.layout,
        "matrices": len(work.plan.matrices),
        "merged": manifest["exported"].get("merged"),
        "output": str(output),
        "rank": work.pairs[0].rank if work.pairs else None,
        "seconds": round(time.monotonic() - started, 3),
    }


def _tell_of_ranks(work: Work) -> None:
    """A line if servers that read the layout have no room for an adapter's rank."""
    ranks = [pair.lora_A.shape[0] for each in work.pairs for pair in each.adapter.pairs.values()]
    if work.plan.layout.portable and max(ranks, default=0) > MOST_SERVED:
        work.observer.note(
            f"the adapter has rank {max(ranks)}, and vLLM serves {MOST_SERVED} at most"
        )


def _homes(path: Path) -> list[Path]:
    return [path.resolve(), *path.resolve().parents]


def _prepared(found: Output, wanted: Wanted, final: Path, observer: Observer) -> Work:
    """Everything settled, and checked as far as headers tell."""
    source = open_source(found.directory)
    layout = make_layout(wanted.layout, found.manifest["recipe"])
    statistics = None if wanted.stats is None else open_statistics(wanted.stats)
    start = found.directory / adapters.DIRECTORY
    pairs, requantizer = [], None
    if wanted.merge:
        assert wanted.adapter is not None
        merging = make_merge_plan(found, source, open_adapter(wanted.adapter), None)
        plan = make_export_plan(found, source, layout, merging)
        before = open_adapter(start) if found.has_adapter else None
        requantizer = Requantizer(plan, before, statistics, choose_device("auto"))
        requantizer.check()
    else:
        plan = make_export_plan(found, source, layout)
        taken = [(start, adapters.DIRECTORY)] if found.has_adapter else []
        taken += [] if wanted.adapter is None else [(wanted.adapter, TRAINED)]
        pairs = [
            exported(found, file, to, plan.matrices, pad=wanted.pad_ranks) for file, to in taken
        ]
    base = wanted.base_model or str(final)
    return Work(plan, pairs, requantizer, statistics, wanted, base, observer)
