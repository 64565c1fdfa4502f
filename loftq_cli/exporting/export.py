"""``loftq export``: the codes of a conversion in another layout, nothing computed anew; or, merged
with a trained adapter, quantized once more.

What cannot be moved exactly is refused. One matrix is in memory at a time. What was interrupted is
gone on with.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.companions import copy_files
from loftq_cli.checkpoint.journal import Journal, Subject
from loftq_cli.checkpoint.output import MANIFEST, Output, open_output, verify
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.checkpoint.shard_output import ShardOutput
from loftq_cli.checkpoint.source import CONFIG, INDEX, open_source
from loftq_cli.checkpoint.unfinished import JournaledWorkspace
from loftq_cli.checkpoint.writer import GrowingShard, index_of
from loftq_cli.errors import InputError, UsageError
from loftq_cli.exporting.adapter import ExportedAdapter, exported
from loftq_cli.exporting.plan import (
    TRAINED,
    ExportPlan,
    Item,
    Moved,
    Requantized,
    make_export_plan,
    name_of,
    specs_of,
)
from loftq_cli.exporting.record import export_manifest
from loftq_cli.exporting.requantize import Requantizer
from loftq_cli.layouts import adapter as adapters
from loftq_cli.layouts.trained import TrainedAdapter, open_adapter
from loftq_cli.loading.intact import verified
from loftq_cli.machine.durable import explained, file_sha256, pretty_json, write_file
from loftq_cli.machine.observer import Observer
from loftq_cli.machine.paths import check_output_path
from loftq_cli.machine.resources import check_space, memory_explained
from loftq_cli.merging.plan import Copied, make_merge_plan
from loftq_cli.merging.value import merged_value
from loftq_cli.planning.choices import choose_device
from loftq_cli.planning.decomposer import threads
from loftq_cli.settings.recipe import fingerprint
from loftq_cli.statistics.file import open_statistics
from loftq_cli.statistics.statistics import Statistics

MOST_SERVED = 512
"""The largest rank that vLLM 0.33 has room for (config/lora.py)."""
_MARGIN = 4 << 20  # room for config and manifest


class ExportWorkspace(JournaledWorkspace):
    """The life of an export."""

    suffix = "loftq-export"
    marker = MANIFEST
    kind = "a conversion"
    doing = "exporting to"
    work = "export"


@dataclass(frozen=True)
class Wanted:
    """What becomes of a conversion: ``layout``; ``adapter``, which training saved, goes to the
    folder ``adapter`` of the output or, with ``merge``, into the codes, which are chosen anew with
    the statistics in ``stats``; ``pad_ranks`` gives every pair one rank, by zeros; ``base_model``
    is what the adapters' configs call the backbone, None the output's own path."""

    layout: str
    adapter: Path | None = None
    merge: bool = False
    stats: Path | None = None
    pad_ranks: bool = False
    base_model: str | None = None

    def check(self) -> None:
        """Raise UsageError if parts of it contradict."""
        if self.merge and self.adapter is None:
            raise UsageError("--merge needs --adapter", hint="name what training saved")
        if self.stats is not None and not self.merge:
            raise UsageError("--stats needs --merge", hint="codes that move stay as they are")
        for option, given in (("pad-ranks", self.pad_ranks), ("base-model", self.base_model)):
            if self.merge and given:
                raise UsageError(
                    f"--{option} is for adapters, and --merge leaves none", hint="leave out one"
                )


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


def _tell_of_ranks(work: _Work) -> None:
    """A line if servers that read the layout have no room for an adapter's rank."""
    ranks = [pair.lora_A.shape[0] for each in work.pairs for pair in each.adapter.pairs.values()]
    if work.plan.layout.portable and max(ranks, default=0) > MOST_SERVED:
        work.observer.note(
            f"the adapter has rank {max(ranks)}, and vLLM serves {MOST_SERVED} at most"
        )


def _homes(path: Path) -> list[Path]:
    return [path.resolve(), *path.resolve().parents]


def _prepared(found: Output, wanted: Wanted, final: Path, observer: Observer) -> _Work:
    """Everything settled, and checked as far as headers tell."""
    source = open_source(found.directory)
    statistics = None if wanted.stats is None else open_statistics(wanted.stats)
    start = found.directory / adapters.DIRECTORY
    pairs, requantizer = [], None
    if wanted.merge:
        assert wanted.adapter is not None
        merging = make_merge_plan(found, source, open_adapter(wanted.adapter), None)
        plan = make_export_plan(found, source, wanted.layout, merging)
        before = open_adapter(start) if found.has_adapter else None
        requantizer = Requantizer(plan, before, statistics, choose_device("auto"))
        requantizer.check()
    else:
        plan = make_export_plan(found, source, wanted.layout)
        taken = [(start, adapters.DIRECTORY)] if found.has_adapter else []
        taken += [] if wanted.adapter is None else [(wanted.adapter, TRAINED)]
        pairs = [
            exported(found, file, to, plan.matrices, pad=wanted.pad_ranks) for file, to in taken
        ]
    base = wanted.base_model or str(final)
    return _Work(plan, pairs, requantizer, statistics, wanted, base, observer)


@dataclass(frozen=True)
class _Work:
    """An export that is settled."""

    plan: ExportPlan
    pairs: Sequence[ExportedAdapter]
    requantizer: Requantizer | None
    statistics: Statistics | None
    wanted: Wanted
    base: str
    observer: Observer

    @property
    def trained(self) -> TrainedAdapter | None:
        """The adapter of --adapter."""
        if self.plan.merging is not None:
            return self.plan.merging.adapter
        return next((each.adapter for each in self.pairs if each.folder == TRAINED), None)

    @cached_property
    def subject(self) -> Subject:
        """What the work is of."""
        found, trained = self.plan.output, self.trained
        settings = {
            "adapter": None if trained is None else file_sha256(trained.file),
            "base_model": self.wanted.base_model,
            "layout": self.wanted.layout,
            "merge": self.wanted.merge,
            "pad_ranks": self.wanted.pad_ranks,
            "stats": None if self.statistics is None else self.statistics.sha256,
        }
        file = found.directory / MANIFEST
        sources = [(MANIFEST, file.stat().st_size, file_sha256(file))]
        told = fingerprint(settings, [(MANIFEST, 0, found.fingerprint)])
        return Subject(told, settings, sources)

    def finished(self, workspace: ExportWorkspace, overwrite: bool) -> dict[str, Any] | None:
        """The manifest of the output if it is this export's, unaltered. Raises
        VerificationError."""
        if overwrite or not (workspace.final / MANIFEST).is_file():
            return None
        existing = open_output(workspace.final)
        if existing.fingerprint != self.subject.fingerprint:
            return None
        verified(existing)
        workspace.discard_unless_other({self.subject.fingerprint: self.subject})
        self.observer.note(f"{workspace.final} is finished already")
        return existing.manifest

    def finish(self, workspace: ExportWorkspace, overwrite: bool) -> dict[str, Any]:
        """Write what is left, and publish; the manifest."""
        workspace.refuse_other_output(overwrite)
        told = self.subject
        if workspace.refuse_other_partial({told.fingerprint: told}, overwrite) is not None:
            self.observer.note(f"resuming the unfinished export in {workspace.partial}")
        try:
            with threads(int(self.plan.output.manifest["recipe"]["threads"])):
                manifest = self.write(workspace)
        except (InputError, UsageError):
            workspace.discard_work()  # what helps is another export
            raise
        workspace.publish(overwrite)
        return manifest

    def write(self, workspace: ExportWorkspace) -> dict[str, Any]:
        """Write every file of the result; its manifest."""
        plan, target = self.plan, workspace.output
        with explained(target):
            target.mkdir(exist_ok=True)
        workspace.keep_only([name for name, _ in plan.shards])
        changed: dict[str, dict[str, Any]] = {}
        self.observer.begin(plan.tensor_bytes, "exporting")
        try:
            with Journal(workspace.journal, self.subject) as journal:
                for name, items in plan.shards:
                    changed |= self._write_shard(journal, target, name, items)
        finally:
            self.observer.end()
        if len(plan.shards) > 1:
            index = index_of((name, specs_of(items)) for name, items in plan.shards)
            write_file(target / INDEX, pretty_json(index))
        copy_files(plan.companions, target)
        entry = {} if plan.entry is None else {"quantization_config": plan.entry}
        write_file(target / CONFIG, pretty_json({**plan.config, **entry}, in_order=True))
        start = self.pairs[0] if self.pairs else None
        with explained(target):
            for each in self.pairs:
                each.write(target, self.base, transposed=plan.transposed)
            told = self.subject
            merged = None
            if plan.merging is not None:
                merged = {key: told.recipe[key] for key in ("adapter", "stats")}
            manifest = export_manifest(plan, start, changed, merged, told.fingerprint, target)
        write_file(target / MANIFEST, pretty_json(manifest))
        return manifest

    def _write_shard(
        self, journal: Journal, target: Path, name: str, items: Sequence[Item]
    ) -> dict[str, dict[str, Any]]:
        """What the manifest says anew of the matrices among ``items``."""
        changed = {}
        with GrowingShard(target / name, specs_of(items)) as shard:
            output = ShardOutput(journal, {name: shard}, name)
            for item in items:
                title = name_of(item)
                self.observer.working_on(title)
                done = output.finished(title)
                record = done.record if done else self._write_item(item, output)
                if record is not None:
                    changed[title] = record
                self.observer.advance(sum(spec.nbytes for spec in specs_of([item])))
            output.settle()
        return changed

    def _write_item(self, item: Item, output: ShardOutput) -> dict[str, Any] | None:
        name = name_of(item)
        if isinstance(item, Copied):
            output.copy(name, bytearray())  # a tensor may be empty
            with TensorFile(item.file) as file:
                for piece in file.pieces(item.tensor):
                    output.copy(name, piece)
            output.end_copy(item.spec, "")
            return None
        with memory_explained(f"tensor {name!r}", hint="free memory for copies of this matrix"):
            tensors, record = self._computed(item)
            output.write(name, "", {output.backbone: tensors}, record)
        return record

    def _computed(self, item: Item) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        if isinstance(item, Moved):
            return item.encoded(self.plan.output.directory, self.plan.stored), None
        if isinstance(item, Requantized):
            assert self.requantizer is not None
            return self.requantizer.requantize(item)
        assert self.plan.merging is not None
        assert not isinstance(item, Copied)
        return {item.spec.name: merged_value(self.plan.merging, item)}, None
