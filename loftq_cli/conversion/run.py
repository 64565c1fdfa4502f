"""From a plan to a finished output: resume or start, convert, publish."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from loftq_cli.checkpoint.journal import Subject, is_damaged
from loftq_cli.checkpoint.output import Output
from loftq_cli.conversion.engine import Conversion
from loftq_cli.conversion.parts import refuse_missing
from loftq_cli.conversion.pin import pin
from loftq_cli.conversion.room import check_resources
from loftq_cli.conversion.sharing import held
from loftq_cli.conversion.subject import subject
from loftq_cli.conversion.workspace import ConversionWorkspace
from loftq_cli.errors import (
    CorruptFileError,
    InputError,
    ScaleRangeError,
    SourceChangedError,
    UsageError,
)
from loftq_cli.kernels import native
from loftq_cli.loading.intact import verified
from loftq_cli.machine.observer import Observer
from loftq_cli.numerics.quantizers.methods import on_host, searches_scales
from loftq_cli.planning import target
from loftq_cli.planning.decomposer import threads
from loftq_cli.planning.make import with_fallback, with_widths
from loftq_cli.planning.plan import Plan
from loftq_cli.settings import maps


@dataclass(frozen=True)
class Outcome:
    """A finished conversion: its manifest, and whether there was nothing left to do."""

    manifest: dict[str, Any]
    nothing_to_do: bool = False


def say_remarks(plan: Plan, observer: Observer) -> None:
    """Tell ``observer`` what the user is to hear before the conversion starts."""
    for line in plan.remarks:
        observer.note(line)
    # Only if there is a search to speed up: asking builds the kernels.
    name = plan.recipe.method
    here = on_host(name) or plan.device.type == "cpu"
    missing = native.load().reason if here and searches_scales(name, plan.recipe.scale) else ""
    if missing and on_host(name):
        observer.note(
            f"method {name} takes a hundred times as long without compiled kernels: {missing}"
        )
    elif missing:
        observer.detail(f"slower without compiled kernels: {missing}")


class Work(Protocol):
    """Others that share the work on a conversion."""

    def work(
        self, plan: Plan, workspace: ConversionWorkspace, identity: Subject, observer: Observer
    ) -> None:
        """Have done, by all, what is not finished of ``plan``."""


def run(
    plan: Plan, path: Path, *, overwrite: bool, observer: Observer, helpers: Work | None = None
) -> Outcome:
    """Convert, resume, or find that it is done already. ``helpers`` do first what can
    be shared.

    Raises OutputConflictError, EnvironmentFailure (disk, device), InputError (non-finite weights,
    a source that changed), VerificationError (a complete output that was altered).
    """
    workspace, planned = ConversionWorkspace(path), plan
    if overwrite or not workspace.is_taken():
        check_resources(plan, workspace)
    # Who shares the work keeps to files of its own: no lock of a network is relied on then.
    with workspace.locked(needed=helpers is None and not workspace.others()):
        if plan.unsettled:
            plan = settled(plan, workspace, overwrite, observer)
        plans = [plan] + ([with_fallback(plan)] if plan.auto_layout else [])
        accepted = {each.fingerprint: subject(each) for each in plans}
        existing = workspace.complete_output()
        if existing is not None and not overwrite and is_of(existing, plan, accepted):
            verified(existing)
            workspace.discard_unless_other(accepted)
            return Outcome(existing.manifest, nothing_to_do=True)
        workspace.refuse_other_output(overwrite, partial(workspace.described, subject(plan)))
        say_remarks(planned, observer)
        if is_damaged(workspace.journal):
            observer.note(f"{workspace.journal} is damaged, or of another version: starting again")
        resumed = workspace.refuse_other_partial(accepted, overwrite)
        if resumed is not None:
            observer.note(f"resuming the unfinished conversion in {workspace.partial}")
            plan = next(each for each in plans if each.fingerprint == resumed)
            if helpers is None:
                refuse_missing(workspace, plan, held(workspace, subject(plan)))
        if resumed is None or overwrite or not workspace.pin.exists():
            pin(workspace, plan.source)
        work = _Work(plan, plans[-1], workspace, overwrite, observer, helpers)
        try:
            return work.finish()
        except SourceChangedError:
            if resumed is None or not overwrite:
                raise
            observer.note("the source has changed since; starting again, as --overwrite says")
            workspace.discard_work()
            return work.finish()


def is_of(output: Output, plan: Plan, accepted: Collection[str]) -> bool:
    """Whether ``output`` is what the plan would give: of one of these fingerprints, and of the same
    contents if those are known, as they are on the hub."""
    files = {entry["name"]: entry["sha256"] for entry in output.manifest["source"]["files"]}
    return output.fingerprint in accepted and all(
        plan.source.supply.sha256(shard.name) in (None, files.get(shard.name))
        for shard in plan.source.shards
    )


def settled(
    plan: Plan, workspace: ConversionWorkspace, overwrite: bool, observer: Observer
) -> Plan:
    """The plan with the widths that its own earlier work or output has, or else settled anew.

    Under ``overwrite`` always anew: the source may be another now. Raises OutputConflictError
    before the pass over the weights if what is there is of something else.
    """
    if not overwrite:
        for recipe, fingerprint in workspace.held():
            if {**recipe, "widths": []} == plan.recipe.as_dict():
                with suppress(UsageError):  # of other matrices, so of another source
                    earlier = with_widths(plan, maps.parse("widths", recipe["widths"]))
                    if earlier.fingerprint == fingerprint:
                        return earlier
        workspace.refuse_other_output(overwrite, partial(workspace.described, subject(plan)))
        workspace.refuse_other_partial({plan.fingerprint: subject(plan)}, overwrite)
    with threads(plan.recipe.threads):
        return target.settle(plan, observer)


@dataclass(frozen=True)
class _Work:
    """A conversion whose workspace is locked and holds nothing but work on ``plan``."""

    plan: Plan
    fallback: Plan
    workspace: ConversionWorkspace
    overwrite: bool
    observer: Observer
    helpers: Work | None

    def finish(self) -> Outcome:
        """Convert what is left, and publish."""
        identity = subject(self.plan)
        conversion = Conversion(self.plan, self.workspace, self.observer)
        try:
            if self.helpers is not None:
                self.helpers.work(self.plan, self.workspace, identity, self.observer)
            with threads(self.plan.recipe.threads):
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
        taken, left = self.fallback.layout.name, self.plan.layout.name
        self.observer.note(f"layout {taken}, because {left} cannot hold it: {message}")
        return replace(self, plan=self.fallback).finish()
