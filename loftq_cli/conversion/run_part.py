"""``convert --part I/N``: one share of a conversion. The command without it publishes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.deliveries import deliver_all
from loftq_cli.checkpoint.differences import differences
from loftq_cli.checkpoint.journal import Journal, Subject, begin, subject_in
from loftq_cli.conversion.engine import Conversion
from loftq_cli.conversion.parts import Part, refuse_other_parts
from loftq_cli.conversion.pin import pin
from loftq_cli.conversion.room import check_memory_for, check_resources
from loftq_cli.conversion.run import is_of, say_remarks, settled
from loftq_cli.conversion.sharing import Sharing, held, make_room
from loftq_cli.conversion.subject import subject
from loftq_cli.conversion.workspace import ConversionWorkspace
from loftq_cli.errors import OutputConflictError, ScaleRangeError, UsageError
from loftq_cli.machine.observer import Observer
from loftq_cli.planning.decomposer import threads
from loftq_cli.planning.plan import Plan


def run_part(
    plan: Plan, path: Path, part: Part, *, overwrite: bool, observer: Observer
) -> dict[str, Any]:
    """Do what is left of ``part``; what it came to, for :func:`loftq_cli.cli.show.part`.

    Nothing is discarded, because other parts may be at work. Raises OutputConflictError for an
    output or unfinished work of something else, and what :func:`loftq_cli.conversion.run.run`
    raises.
    """
    if len(plan.devices) > 1:
        raise UsageError("--part takes one device", hint="start a part for each device")
    workspace, planned = ConversionWorkspace(path), plan
    fresh = not workspace.is_taken() and not workspace.holds_work()
    if fresh or overwrite:
        check_resources(plan, workspace)
    else:
        check_memory_for(plan)
    with workspace.locked(shared=True, needed=False):
        if plan.unsettled:
            plan = settled(plan, workspace, overwrite, observer)
        identity = subject(plan)
        existing = workspace.complete_output()
        if existing is not None and not overwrite and is_of(existing, plan, [plan.fingerprint]):
            return _summary(part, plan, 0, published=True)
        workspace.refuse_other_output(overwrite, partial(workspace.described, identity))
        say_remarks(planned, observer)
        _begin(workspace, identity)
        refuse_other_parts(workspace, part)
        if not workspace.pin.exists():
            pin(workspace, plan.source)
        return _Share(plan, workspace, part, observer).finish(identity)


def _begin(workspace: ConversionWorkspace, identity: Subject) -> None:
    """Have a journal there that says what the work is of. Raises OutputConflictError if it is of
    something else."""
    found = subject_in(workspace.journal)
    if found is None:
        begin(workspace.journal, identity)
        found = subject_in(workspace.journal)  # another part may have begun something else
    if found is None or found.fingerprint != identity.fingerprint:
        there = "" if found is None else f" with other settings: {differences(found, identity)}"
        raise OutputConflictError(
            f"{workspace.partial} holds an unfinished conversion{there}",
            hint="give every part the same settings, or remove it to begin anew",
        )


@dataclass(frozen=True)
class _Share:
    plan: Plan
    workspace: ConversionWorkspace
    part: Part
    observer: Observer

    def finish(self, identity: Subject) -> dict[str, Any]:
        plan, workspace, observer = self.plan, self.workspace, self.observer
        share = self.part.of(plan)
        before = held(workspace, identity)
        left = [job for job in share if not before.has(job)]
        if left:
            deliver_all(plan.source, observer)
            make_room(workspace)
            observer.begin(sum(job.cost for job in share), f"converting {self.part}")
            observer.count(sum(len(job.matrices) for job in share), "matrices")
            observer.skip(sum(job.cost for job in share if before.has(job)))
            try:
                with threads(plan.recipe.threads):
                    conversion = Conversion(plan, workspace, observer)
                    path = workspace.new_journal(self.part.journal)
                    with Journal(path, identity) as journal:
                        Sharing(conversion, journal, hashes=True).carry_out(left)
            except ScaleRangeError as error:
                if not plan.auto_layout:
                    raise
                raise UsageError(
                    f"layout {plan.layout.name}: {error.message}",
                    hint="give --layout loftq to every part, with another --output",
                ) from error
            finally:
                observer.end()
        return _summary(self.part, plan, len(left), published=False)


def _summary(part: Part, plan: Plan, done: int, *, published: bool) -> dict[str, Any]:
    return {
        "part": part.number,
        "parts": part.count,
        "matrices": sum(len(job.matrices) for job in part.of(plan)),
        "nothing_to_do": done == 0,
        "published": published,
        "fingerprint": plan.fingerprint,
    }
