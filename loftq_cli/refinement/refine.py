"""``loftq refine``: a finished conversion, trained against its original on text, as a new one.

Block by block, in the memory of one block, and then, if it is asked for, end to end. What is
finished of it is kept; a command that was interrupted goes on behind the last finished block.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from loftq_cli.calibration.text_file import Text, read_text
from loftq_cli.checkpoint.deliveries import deliver_all
from loftq_cli.checkpoint.journal import Subject
from loftq_cli.checkpoint.output import MANIFEST, Output, open_output, require_backbone, verify
from loftq_cli.checkpoint.source import Source, file_hashes, open_source
from loftq_cli.errors import InputError, SourceChangedError, UsageError
from loftq_cli.layouts.trained import open_adapter
from loftq_cli.loading.intact import verified
from loftq_cli.machine.durable import file_sha256
from loftq_cli.machine.observer import Observer
from loftq_cli.machine.paths import check_output_path
from loftq_cli.machine.resources import check_space
from loftq_cli.machine.world import ALONE, World
from loftq_cli.planning.choices import choose_device
from loftq_cli.refinement.conversion import Conversion
from loftq_cli.refinement.room import disk_bytes, resolved
from loftq_cli.refinement.run import Run
from loftq_cli.refinement.settings import BATCH, Refining
from loftq_cli.refinement.stages import RefineWorkspace
from loftq_cli.reporting.original import converted_source
from loftq_cli.settings.recipe import fingerprint

_SHARING = [count for count in range(1, BATCH + 1) if BATCH % count == 0]
"""How many processes can share the windows of a step: halves, and halves of halves."""


def refine(
    directory: Path,
    output: Path,
    source: str,
    texts: Sequence[Path],
    wanted: Refining,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    observer: Observer,
    world: World = ALONE,
) -> dict[str, Any]:
    """Refine the conversion in ``directory`` of the model ``source`` on ``texts``, whose windows
    the processes of ``world`` share, and write ``output``; what ``--json`` prints.

    Raises UsageError, InputError for the conversion, the model, the adapter or the texts,
    SourceChangedError if the model is not what was converted, OutputConflictError,
    EnvironmentFailure.
    """
    started = time.monotonic()
    _refuse_odd(world)
    device = choose_device(wanted.device)
    read = [read_text("--text", path) for path in texts]
    found = open_output(directory)
    require_backbone(found)
    verify(found)
    final = check_output_path(output, directory)
    trained = None if wanted.adapter is None else open_adapter(wanted.adapter)
    with world.in_turn("found"):
        original = converted_source(found, source, offline=wanted.offline, say=observer.note)
    if original.directory.resolve() in final.parents:
        raise UsageError(
            f"--output {output} is inside the model {original.directory}",
            hint="write it elsewhere",
        )
    conversion = Conversion(found, open_source(directory), original, trained)
    workspace = RefineWorkspace(final)
    adapter = None if trained is None else file_sha256(trained.file)
    asked = _Job(conversion, read, wanted, adapter, device, world)
    world.agree(asked.settings(), [*asked.subject.sources, *file_hashes(original)], device)
    job = replace(asked, wanted=_settled(asked, workspace))
    if world.first:
        if overwrite or not workspace.is_taken():
            check_space(final.parent, disk_bytes(conversion) - workspace.written())
        workspace.check_permissions()
    if dry_run:
        return {**job.described(str(output)), "disk_bytes": disk_bytes(conversion)}
    with workspace.locked() if world.first else nullcontext():
        manifest = job.finished(workspace, overwrite, observer) if world.first else None
        if not world.told(lambda: manifest is not None):
            with world.in_turn("delivered"):
                deliver_all(original, observer)
            _refuse_changed(found, original)
            manifest = job.finish(workspace, overwrite, started, observer)
    told = world.told(lambda: _told(manifest))
    return {
        **job.described(str(output)),
        **told,
        "seconds": round(time.monotonic() - started, 3),
    }


def _told(manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """What ``--json`` says that the manifest does."""
    assert manifest is not None, "rank 0 has it"
    told = manifest["refined"]
    return {
        **{key: told[key] for key in ("samples", "length", "tokens", "blocks")},
        "end_to_end": told.get("end_to_end"),
        "relative_residual": manifest["totals"]["relative_residual"],
    }


def _refuse_odd(world: World) -> None:
    """Raise UsageError if there are more processes than windows in a step, or if these cannot be
    halved among them."""
    if world.size not in _SHARING:
        raise UsageError(
            f"refine takes {' or '.join(map(str, _SHARING[1:]))} processes, or one, and there are "
            f"{world.size}: each step is on {BATCH} windows, which they share",
            hint="start so many",
        )


def _settled(job: _Job, workspace: RefineWorkspace) -> Refining:
    """What is wanted, with what it leaves open as there is memory for it on rank 0. Raises
    EnvironmentFailure if there is not enough memory here."""

    def find() -> list[int | None]:
        found = resolved(job.conversion, workspace.wanted(job.wanted), job.device)
        return [found.epochs, found.end_to_end]

    epochs, steps = job.world.told(find)
    settled = replace(job.wanted, epochs=epochs, end_to_end=steps)
    return settled if job.world.first else resolved(job.conversion, settled, job.device)


def _refuse_changed(found: Output, original: Source) -> None:
    """Raise SourceChangedError if a file of the model is not the one that was converted."""
    stated = {entry["name"]: entry for entry in found.manifest["source"]["files"]}
    for shard in original.shards:
        entry = stated.get(shard.name)
        if entry is None or file_sha256(shard.path) != entry["sha256"]:
            raise SourceChangedError(
                f"{shard.path}: not the file that was converted",
                hint="give the model that was converted, as it was",
            )


@dataclass(frozen=True)
class _Job:
    """A refinement whose input was checked. ``adapter``: the sha256 of a trained one's file."""

    conversion: Conversion
    texts: Sequence[Text]
    wanted: Refining
    adapter: str | None
    device: torch.device
    world: World

    def described(self, output: str) -> dict[str, Any]:
        """What ``--json`` says of it."""
        return {
            "directory": str(self.conversion.directory),
            "source": self.conversion.original.id,
            "output": output,
            "adapter": None if self.wanted.adapter is None else str(self.wanted.adapter),
            "layout": self.conversion.output.records[0]["layout"],
            "matrices": len(self.conversion.held),
            "epochs": self.wanted.epochs,
            "steps": self.wanted.end_to_end,
            "device": str(self.device),
        }

    def settings(self) -> dict[str, Any]:
        """What changes bytes."""
        return {
            **self.wanted.described(),
            "adapter": self.adapter,
            "device": self.device.type,
            "texts": [text.sha256 for text in self.texts],
            "threads": torch.get_num_threads(),
        }

    @cached_property
    def subject(self) -> Subject:
        """What the work is of."""
        manifest = self.conversion.directory / MANIFEST
        digest = file_sha256(manifest)
        settings = self.settings()
        told = fingerprint(settings, [(MANIFEST, 0, digest)])
        return Subject(told, settings, [(MANIFEST, manifest.stat().st_size, digest)])

    def finished(
        self, workspace: RefineWorkspace, overwrite: bool, observer: Observer
    ) -> dict[str, Any] | None:
        """The manifest of the output if it is this refinement's, unaltered."""
        if overwrite or not (workspace.final / MANIFEST).is_file():
            return None
        existing, subject = open_output(workspace.final), self.subject
        if existing.fingerprint != subject.fingerprint:
            return None
        verified(existing)
        workspace.discard_unless_other({subject.fingerprint: subject})
        observer.note(f"{workspace.final} is finished already")
        return existing.manifest

    def finish(
        self, workspace: RefineWorkspace, overwrite: bool, started: float, observer: Observer
    ) -> dict[str, Any] | None:
        """Do what is left, and publish; the manifest, of rank 0."""
        if not self.world.first:
            self._run(self.subject, observer).assist(workspace)
            return None
        workspace.refuse_other_output(overwrite)
        subject = self.subject
        if workspace.refuse_other_partial({subject.fingerprint: subject}, overwrite) is not None:
            observer.note(f"resuming the unfinished refinement in {workspace.partial}")
        if self.world.size > 1:
            observer.note(f"{self.world.size} processes share the {BATCH} windows of each step")
        try:
            manifest = self._run(subject, observer).write(workspace, started)
        except (InputError, UsageError):
            workspace.discard_work()  # what helps is another refinement
            raise
        workspace.publish(overwrite)
        return manifest

    def _run(self, subject: Subject, observer: Observer) -> Run:
        return Run(
            self.conversion, self.texts, self.wanted, self.device, subject, observer, self.world
        )
