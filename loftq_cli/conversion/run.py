"""From a model's name to a finished output: plan, resume or start, convert, publish."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loftq_cli import maps
from loftq_cli.checkpoint.locate import locate
from loftq_cli.checkpoint.output import verify
from loftq_cli.conversion import experts, target
from loftq_cli.conversion.choices import searches_scales
from loftq_cli.conversion.engine import Conversion
from loftq_cli.conversion.journal import Identity
from loftq_cli.conversion.observer import Observer
from loftq_cli.conversion.plan import Plan, make_plan, source_identity
from loftq_cli.conversion.statistics import statistics_for
from loftq_cli.conversion.workspace import Workspace, check_output_path, check_space
from loftq_cli.errors import InputError, ScaleRangeError, SourceChangedError, UsageError
from loftq_cli.numerics import native
from loftq_cli.recipe import Options

_MARGIN = 4 << 20  # room for config, tokenizer, manifest and journal


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
    observer: Observer,
) -> tuple[Plan, Path]:
    """The plan of a conversion and the absolute output path; nothing is written.

    Raises UsageError for bad settings or an output inside the input, InputError for a bad source,
    EnvironmentFailure where the hub or the device cannot be reached.
    """
    resolved = options.resolve()
    source = locate(model, revision=revision, offline=offline, say=observer.note)
    path = check_output_path(Path(output), source.directory)
    statistics = None if resolved.stats is None else statistics_for(source, resolved.stats)
    plan = make_plan(source, resolved, statistics)
    target.check(plan)
    if plan.unmeasured:
        observer.note(
            f"{len(plan.unmeasured)} of {len(plan.matrices)} matrices are not in {resolved.stats} "
            "and are converted without statistics"
        )
    experts_note = experts.note(plan.selection.kept, source.config.content)
    for line in (plan.layout_note, experts_note):
        if line:
            observer.note(line)
    # Only where there is a search to speed up: asking builds the kernels.
    searches = searches_scales(plan.recipe.method, plan.recipe.scale)
    if searches and plan.device.type == "cpu" and native.load().reason:
        observer.detail(f"slower without compiled kernels: {native.load().reason}")
    return plan, path


def run(plan: Plan, path: Path, *, overwrite: bool, observer: Observer) -> Outcome:
    """Convert, resume, or find that it is done already.

    Raises OutputConflictError, EnvironmentFailure (disk, device), InputError (non-finite weights,
    a source that changed), VerificationError (a complete output that was altered).
    """
    workspace = Workspace(path)
    with workspace.locked():
        if plan.unsettled:
            plan = _settled(plan, workspace, overwrite, observer)
        plans = [plan] + ([plan.with_fallback()] if plan.auto_layout else [])
        accepted = {each.fingerprint: _identity(each) for each in plans}
        existing = workspace.complete_output()
        if existing is not None and existing.fingerprint in accepted and not overwrite:
            verify(existing)
            workspace.discard_unless_other(accepted)
            return Outcome(existing.manifest, nothing_to_do=True)
        workspace.refuse_other_output(_identity(plan), overwrite)
        resumed = workspace.refuse_other_partial(accepted, overwrite)
        check_space(path.parent, plan.disk_bytes + _MARGIN - workspace.written())
        if resumed is not None:
            observer.note(f"resuming the unfinished conversion in {workspace.partial}")
            plan = next(each for each in plans if each.fingerprint == resumed)
        work = _Work(plan, plans[-1], workspace, overwrite, observer)
        try:
            return work.finish()
        except SourceChangedError:
            if resumed is None or not overwrite:
                raise
            observer.note("the source has changed since; starting again, as --overwrite says")
            workspace.discard_work()
            return work.finish()


def _settled(plan: Plan, workspace: Workspace, overwrite: bool, observer: Observer) -> Plan:
    """The plan with the widths that its own earlier work or output has, or else settled anew.

    Under ``overwrite`` always anew: the source may be another now. Raises OutputConflictError
    before the pass over the weights where what is there is of something else.
    """
    if not overwrite:
        for recipe, fingerprint in workspace.held():
            if {**recipe, "widths": []} == plan.recipe.as_dict():
                with suppress(UsageError):  # of other matrices, so of another source
                    earlier = plan.with_widths(maps.parse("widths", recipe["widths"]))
                    if earlier.fingerprint == fingerprint:
                        return earlier
        workspace.refuse_other_output(_identity(plan), overwrite)
        workspace.refuse_other_partial({plan.fingerprint: _identity(plan)}, overwrite)
    with _threads(plan.recipe.threads):
        return target.settle(plan, observer)


@dataclass(frozen=True)
class _Work:
    """A conversion whose workspace is locked and holds nothing but work on ``plan``."""

    plan: Plan
    fallback: Plan
    workspace: Workspace
    overwrite: bool
    observer: Observer

    def finish(self) -> Outcome:
        """Convert what is left, and publish."""
        identity = _identity(self.plan)
        try:
            with _threads(self.plan.recipe.threads):
                conversion = Conversion(self.plan, self.workspace, self.observer)
                manifest = conversion.run(identity)
            self.workspace.publish(identity, self.overwrite)
            return Outcome(manifest)
        except ScaleRangeError as error:
            self.workspace.discard_work()
            if self.plan is self.fallback:
                raise
            message = error.message
        except SourceChangedError:
            raise
        except InputError:
            # The work cannot be of use: what repairs the input changes the fingerprint.
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
