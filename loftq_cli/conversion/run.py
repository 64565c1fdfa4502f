"""From a model's name to a finished output: plan, resume or start, convert, publish."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loftq_cli.calibration import first as calibrate_first
from loftq_cli.calibration.first import Texts
from loftq_cli.checkpoint.companions import companion_bytes
from loftq_cli.checkpoint.locate import is_path, locate
from loftq_cli.checkpoint.output import Output
from loftq_cli.checkpoint.source import source_identity
from loftq_cli.conversion.differences import differences, differing_settings
from loftq_cli.conversion.engine import Conversion
from loftq_cli.conversion.journal import Identity, is_damaged
from loftq_cli.conversion.pin import pin, pinned
from loftq_cli.conversion.workspace import ConversionWorkspace
from loftq_cli.errors import (
    CorruptFileError,
    InputError,
    OutputConflictError,
    ScaleRangeError,
    SourceChangedError,
    UsageError,
)
from loftq_cli.families import experts
from loftq_cli.kernels import native
from loftq_cli.loading.intact import verified
from loftq_cli.machine.observer import Observer
from loftq_cli.machine.paths import check_output_path, real_path
from loftq_cli.machine.resources import check_memory
from loftq_cli.numerics.quantizers.methods import searches_scales
from loftq_cli.planning import target
from loftq_cli.planning.download import check_disks
from loftq_cli.planning.make import make_plan, with_fallback, with_widths
from loftq_cli.planning.memory import memory_bytes
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.remarks import source_remarks, statistics_note
from loftq_cli.planning.unused import unused_notes
from loftq_cli.settings import maps
from loftq_cli.settings.options import Options
from loftq_cli.settings.table import Settings
from loftq_cli.statistics.file import statistics_for

_MARGIN = 4 << 20  # room for config, manifest and journal
_SETTLED = ("widths", "layout", "layout_fallback")
"""Fields of a recipe that may not be known yet when it is first planned."""


@dataclass(frozen=True)
class Outcome:
    """A finished conversion: its manifest, and whether there was nothing left to do."""

    manifest: dict[str, Any]
    nothing_to_do: bool = False


def prepare(
    model: str,
    output: str | Path,
    options: Options,
    *,
    revision: str | None = None,
    offline: bool = False,
    overwrite: bool = False,
    discard_shards: bool = False,
    allow_pickle: bool = False,
    texts: Texts | None = None,
    observer: Observer,
) -> tuple[Plan, Path]:
    """The plan of a conversion and the absolute output path; nothing is written but the small
    files of a hub model to the hub cache, and statistics of ``texts``, which are measured now
    unless they lie beside the output already.

    Unfinished work goes on with the commit that it was begun with, unless ``overwrite``.
    ``discard_shards``: shards that are not in the hub cache pass through the partial directory.
    ``allow_pickle``: a directory with no other weights may have pickled ones.

    Where nobody chose the number of threads, it is that of unfinished work with these settings, or
    (unless it is to be overwritten) of an output with them: another would change the bytes.

    Raises UsageError for bad settings or an output inside the input, InputError for a bad source,
    EnvironmentFailure where the hub or the device cannot be reached.
    """
    resolved = options.resolve()
    if texts is not None:
        _check_texts(resolved, discard_shards=discard_shards, allow_pickle=allow_pickle)
    if discard_shards and is_path(model):
        raise UsageError(
            f"--discard-shards is for models from the hub; the files of {model} are never deleted",
            hint="leave the option out",
        )
    workspace = ConversionWorkspace(real_path(Path(output)))
    source = locate(
        model,
        revision=revision,
        offline=offline,
        pinned=None if overwrite else pinned(workspace, model, revision),
        passing=workspace.passing if discard_shards else None,
        allow_pickle=allow_pickle,
        say=observer.note,
    )
    path = check_output_path(Path(output), source.directory)
    statistics = None if resolved.stats is None else statistics_for(source, resolved.stats)
    plan = make_plan(source, resolved, statistics)
    target.check(plan)
    if texts is not None:
        statistics = calibrate_first.found(source, path, texts, overwrite=overwrite)
        if statistics is None and texts.dry_run:
            observer.note("the statistics are measured first; this plan is made without them")
        elif statistics is None:
            _refuse_beforehand(plan, workspace, overwrite)
            _check_resources(plan, workspace)
            statistics = calibrate_first.measured(
                source, path, texts, device=resolved.device, observer=observer
            )
        if statistics is not None:
            plan = make_plan(source, resolved, statistics)
    if resolved.threads is None:
        plan = _with_earlier_threads(plan, workspace, overwrite)
    return replace(plan, remarks=_remarks(plan, options, measuring=texts is not None)), path


def _remarks(plan: Plan, options: Options, *, measuring: bool) -> tuple[str, ...]:
    lines: list[str | None] = [*source_remarks(plan)]
    if plan.unmeasured and plan.statistics is not None:
        where = plan.statistics.path
        lines.append(
            f"{len(plan.unmeasured)} of {len(plan.matrices)} matrices are not in {where} "
            "and are converted without statistics"
        )
    lines += [plan.layout_note, experts.note(plan.selection.kept, plan.source.config.content)]
    lines += [None if measuring else statistics_note(plan, options.preset)]
    return tuple(line for line in (*lines, *unused_notes(options, plan.recipe)) if line)


def say_remarks(plan: Plan, observer: Observer) -> None:
    """Tell ``observer`` what the user is to hear before the conversion starts."""
    for line in plan.remarks:
        observer.note(line)
    # Only where there is a search to speed up: asking builds the kernels.
    searches = searches_scales(plan.recipe.method, plan.recipe.scale)
    if searches and plan.device.type == "cpu" and native.load().reason:
        observer.detail(f"slower without compiled kernels: {native.load().reason}")


def run(plan: Plan, path: Path, *, overwrite: bool, observer: Observer) -> Outcome:
    """Convert, resume, or find that it is done already.

    Raises OutputConflictError, EnvironmentFailure (disk, device), InputError (non-finite weights,
    a source that changed), VerificationError (a complete output that was altered).
    """
    workspace, planned = ConversionWorkspace(path), plan
    if overwrite or not workspace.is_taken():
        _check_resources(plan, workspace)
    with workspace.locked():
        if plan.unsettled:
            plan = _settled(plan, workspace, overwrite, observer)
        plans = [plan] + ([with_fallback(plan)] if plan.auto_layout else [])
        accepted = {each.fingerprint: _identity(each) for each in plans}
        existing = workspace.complete_output()
        if existing is not None and not overwrite and _is_of(existing, plan, accepted):
            verified(existing)
            workspace.discard_unless_other(accepted)
            return Outcome(existing.manifest, nothing_to_do=True)
        workspace.refuse_other_output(overwrite, partial(workspace.described, _identity(plan)))
        say_remarks(planned, observer)
        if is_damaged(workspace.journal):
            observer.note(f"{workspace.journal} is damaged, or of another version: starting again")
        resumed = workspace.refuse_other_partial(accepted, overwrite)
        if resumed is not None:
            observer.note(f"resuming the unfinished conversion in {workspace.partial}")
            plan = next(each for each in plans if each.fingerprint == resumed)
        if resumed is None or overwrite or not workspace.pin.exists():
            pin(workspace, plan.source)
        work = _Work(plan, plans[-1], workspace, overwrite, observer)
        try:
            return work.finish()
        except SourceChangedError:
            if resumed is None or not overwrite:
                raise
            observer.note("the source has changed since; starting again, as --overwrite says")
            workspace.discard_work()
            return work.finish()


def _is_of(output: Output, plan: Plan, accepted: Collection[str]) -> bool:
    """Whether ``output`` is what the plan would give: of one of these fingerprints, and of the same
    contents where those are known, as they are on the hub."""
    files = {entry["name"]: entry["sha256"] for entry in output.manifest["source"]["files"]}
    return output.fingerprint in accepted and all(
        plan.source.supply.sha256(shard.name) in (None, files.get(shard.name))
        for shard in plan.source.shards
    )


def _with_earlier_threads(plan: Plan, workspace: ConversionWorkspace, overwrite: bool) -> Plan:
    wanted = plan.recipe.as_dict()
    for held, _ in workspace.held(finished=not overwrite):
        differing = differing_settings(held, wanted)
        if "threads" in differing and differing <= {"threads", *_SETTLED}:
            return replace(plan, recipe=replace(plan.recipe, threads=held["threads"]))
    return plan


def _check_texts(settings: Settings, *, discard_shards: bool, allow_pickle: bool) -> None:
    """Raise UsageError where statistics cannot be measured first."""
    if settings.stats is not None:
        raise UsageError(f"--stats and {calibrate_first.OPTION} exclude each other")
    for given, option, why in (
        (discard_shards, "--discard-shards", "running the model needs all of its shards"),
        (allow_pickle, "--allow-pickle", "the model is run by transformers, from safetensors only"),
    ):
        if given:
            raise UsageError(
                f"{option} and {calibrate_first.OPTION} exclude each other: {why}",
                hint="measure where that is possible, and give the file with --stats",
            )


def _refuse_beforehand(plan: Plan, workspace: ConversionWorkspace, overwrite: bool) -> None:
    """Raise OutputConflictError where what is there cannot be of this conversion, whatever the
    statistics will be: measuring them takes long."""
    if overwrite:
        return
    if workspace.complete_output() is None:
        workspace.refuse_other_output(overwrite)
    wanted = {**plan.recipe.as_dict(), "stats": "to be measured"}
    for held, _ in workspace.held():
        differing = differing_settings(held, wanted)
        if held.get("stats") is None or not differing <= {"stats", "threads", *_SETTLED}:
            if held.get("stats") is not None:
                held = {**held, "stats": wanted["stats"]}  # they may be the same in the end
            there = Identity("", held, source_identity(plan.source))
            now = Identity("", wanted, source_identity(plan.source))
            raise OutputConflictError(
                f"{workspace.final}: there is another conversion: {differences(there, now)}"
            )


def _check_resources(plan: Plan, workspace: ConversionWorkspace) -> None:
    """Raise EnvironmentFailure where disk, memory or permissions are not enough; writes nothing."""
    copied = companion_bytes(plan.source.directory)
    needed = plan.disk_bytes + target.headroom(plan) + copied + _MARGIN
    check_disks(plan.source, workspace.final.parent, needed - workspace.written())
    workspace.check_permissions()
    largest = max(plan.matrices, key=lambda name: plan.matrices[name].matrix.elements)
    check_memory(memory_bytes(plan), f"tensor {largest!r}", plan.device)


def _settled(
    plan: Plan, workspace: ConversionWorkspace, overwrite: bool, observer: Observer
) -> Plan:
    """The plan with the widths that its own earlier work or output has, or else settled anew.

    Under ``overwrite`` always anew: the source may be another now. Raises OutputConflictError
    before the pass over the weights where what is there is of something else.
    """
    if not overwrite:
        for recipe, fingerprint in workspace.held():
            if {**recipe, "widths": []} == plan.recipe.as_dict():
                with suppress(UsageError):  # of other matrices, so of another source
                    earlier = with_widths(plan, maps.parse("widths", recipe["widths"]))
                    if earlier.fingerprint == fingerprint:
                        return earlier
        workspace.refuse_other_output(overwrite, partial(workspace.described, _identity(plan)))
        workspace.refuse_other_partial({plan.fingerprint: _identity(plan)}, overwrite)
    with _threads(plan.recipe.threads):
        return target.settle(plan, observer)


@dataclass(frozen=True)
class _Work:
    """A conversion whose workspace is locked and holds nothing but work on ``plan``."""

    plan: Plan
    fallback: Plan
    workspace: ConversionWorkspace
    overwrite: bool
    observer: Observer

    def finish(self) -> Outcome:
        """Convert what is left, and publish."""
        identity = _identity(self.plan)
        try:
            with _threads(self.plan.recipe.threads):
                conversion = Conversion(self.plan, self.workspace, self.observer)
                manifest = conversion.run(identity)
            self.workspace.publish(self.overwrite, partial(self.workspace.described, identity))
            return Outcome(manifest)
        except ScaleRangeError as error:
            self.workspace.discard_work()
            if self.plan is self.fallback:
                raise
            message = error.message
        except (SourceChangedError, CorruptFileError):
            raise  # a file that was replaced or shortened meanwhile may be restored
        except InputError:
            # The work cannot be of use: what helps changes the fingerprint.
            self.workspace.discard_work()
            raise
        finally:
            self.observer.end()
        self.observer.note(f"layout loftq, because gptq cannot hold it: {message}")
        return replace(self, plan=self.fallback).finish()


def _identity(plan: Plan) -> Identity:
    return Identity(plan.fingerprint, plan.recipe.as_dict(), source_identity(plan.source))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """The thread count of the recipe: it changes the last bits of matrix products."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
