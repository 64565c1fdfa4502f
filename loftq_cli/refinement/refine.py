"""``loftq refine``: a finished conversion, trained against its original on text, as a new one.

Block by block, in the memory of one block, and then, if it is asked for, end to end. What is
finished of it is kept; a command that was interrupted goes on behind the last finished block.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loftq_cli.calibration.calibrate import Text, read_text
from loftq_cli.checkpoint.deliveries import deliver_all
from loftq_cli.checkpoint.journal import Subject
from loftq_cli.checkpoint.output import MANIFEST, Output, open_output, require_backbone, verify
from loftq_cli.checkpoint.source import Source, open_source
from loftq_cli.errors import InputError, SourceChangedError, UsageError
from loftq_cli.layouts.trained import TrainedAdapter, open_adapter
from loftq_cli.loading.intact import verified
from loftq_cli.machine.durable import file_sha256
from loftq_cli.machine.observer import Observer
from loftq_cli.machine.paths import check_output_path
from loftq_cli.machine.resources import check_space
from loftq_cli.planning.choices import choose_device
from loftq_cli.refinement.conversion import Conversion
from loftq_cli.refinement.room import disk_bytes, resolved
from loftq_cli.refinement.run import Run
from loftq_cli.refinement.settings import Refining
from loftq_cli.refinement.stages import RefineWorkspace
from loftq_cli.reporting.original import converted_source
from loftq_cli.settings.recipe import fingerprint


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
) -> dict[str, Any]:
    """Refine the conversion in ``directory`` of the model ``source`` on ``texts``, and write
    ``output``; what ``--json`` prints.

    Raises UsageError, InputError for the conversion, the model, the adapter or the texts,
    SourceChangedError if the model is not what was converted, OutputConflictError,
    EnvironmentFailure.
    """
    started = time.monotonic()
    device = choose_device(wanted.device)
    read = [read_text("--text", path) for path in texts]
    found = open_output(directory)
    require_backbone(found)
    verify(found)
    final = check_output_path(output, directory)
    trained = None if wanted.adapter is None else open_adapter(wanted.adapter)
    original = converted_source(found, source, offline=wanted.offline, say=observer.note)
    if original.directory.resolve() in final.parents:
        raise UsageError(
            f"--output {output} is inside the model {original.directory}",
            hint="write it elsewhere",
        )
    conversion = Conversion(found, open_source(directory), original, trained)
    workspace = RefineWorkspace(final)
    settled = resolved(conversion, workspace.wanted(wanted), device)
    job = _Job(conversion, read, settled, trained, device)
    if overwrite or not workspace.is_taken():
        check_space(final.parent, disk_bytes(conversion) - workspace.written())
    workspace.check_permissions()
    if dry_run:
        return {**job.described(str(output)), "disk_bytes": disk_bytes(conversion)}
    with workspace.locked():
        manifest = job.finished(workspace, overwrite, observer)
        if manifest is None:
            deliver_all(original, observer)
            _refuse_changed(found, original)
            manifest = job.finish(workspace, overwrite, started, observer)
    told = manifest["refined"]
    return {
        **job.described(str(output)),
        **{key: told[key] for key in ("samples", "length", "tokens", "blocks")},
        "end_to_end": told.get("end_to_end"),
        "relative_residual": manifest["totals"]["relative_residual"],
        "seconds": round(time.monotonic() - started, 3),
    }


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
    """A refinement whose input was checked."""

    conversion: Conversion
    texts: Sequence[Text]
    wanted: Refining
    trained: TrainedAdapter | None
    device: torch.device

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

    def subject(self) -> Subject:
        """What the work is of."""
        manifest = self.conversion.directory / MANIFEST
        digest = file_sha256(manifest)
        settings = {
            **self.wanted.described(),
            "adapter": None if self.trained is None else file_sha256(self.trained.file),
            "device": self.device.type,
            "texts": [text.sha256 for text in self.texts],
            "threads": torch.get_num_threads(),
        }
        told = fingerprint(settings, [(MANIFEST, 0, digest)])
        return Subject(told, settings, [(MANIFEST, manifest.stat().st_size, digest)])

    def finished(
        self, workspace: RefineWorkspace, overwrite: bool, observer: Observer
    ) -> dict[str, Any] | None:
        """The manifest of the output if it is this refinement's, unaltered."""
        if overwrite or not (workspace.final / MANIFEST).is_file():
            return None
        existing, subject = open_output(workspace.final), self.subject()
        if existing.fingerprint != subject.fingerprint:
            return None
        verified(existing)
        workspace.discard_unless_other({subject.fingerprint: subject})
        observer.note(f"{workspace.final} is finished already")
        return existing.manifest

    def finish(
        self, workspace: RefineWorkspace, overwrite: bool, started: float, observer: Observer
    ) -> dict[str, Any]:
        """Do what is left, and publish; the manifest."""
        workspace.refuse_other_output(overwrite)
        subject = self.subject()
        if workspace.refuse_other_partial({subject.fingerprint: subject}, overwrite) is not None:
            observer.note(f"resuming the unfinished refinement in {workspace.partial}")
        run = Run(self.conversion, self.texts, self.wanted, self.device, subject, observer)
        try:
            manifest = run.write(workspace, started)
        except (InputError, UsageError):
            workspace.discard_work()  # what helps is another refinement
            raise
        workspace.publish(overwrite)
        return manifest
