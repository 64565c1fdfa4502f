"""An export that is settled: written, tensor by tensor, and published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.companions import copy_files
from loftq_cli.checkpoint.journal import Journal, Subject
from loftq_cli.checkpoint.output import MANIFEST, open_output
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.checkpoint.shard_output import ShardOutput
from loftq_cli.checkpoint.source import CONFIG, INDEX
from loftq_cli.checkpoint.unfinished import JournaledWorkspace
from loftq_cli.checkpoint.writer import GrowingShard, index_of
from loftq_cli.errors import InputError, UsageError
from loftq_cli.exporting.adapter import ExportedAdapter
from loftq_cli.exporting.plan import (
    TRAINED,
    ExportPlan,
    Item,
    Moved,
    Requantized,
    name_of,
    specs_of,
)
from loftq_cli.exporting.record import export_manifest
from loftq_cli.exporting.requantize import Requantizer
from loftq_cli.layouts.trained import TrainedAdapter
from loftq_cli.loading.intact import verified
from loftq_cli.machine.durable import explained, file_sha256, pretty_json, write_file
from loftq_cli.machine.observer import Observer
from loftq_cli.machine.resources import memory_explained
from loftq_cli.merging.plan import Copied
from loftq_cli.merging.value import merged_value
from loftq_cli.planning.decomposer import threads
from loftq_cli.settings.recipe import fingerprint
from loftq_cli.statistics.statistics import Statistics


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


@dataclass(frozen=True)
class Work:
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
