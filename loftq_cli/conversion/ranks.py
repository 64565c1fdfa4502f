"""One conversion by several processes that torchrun, accelerate or srun started.

Each takes the next job from a counter, and keeps a journal of what it finished. Rank 0 settles what
is done, tells the others, and in the end does what one process always does with unfinished work: it
verifies what is there, does what is missing and publishes. If a rung of this ladder breaks, what is
finished stays finished.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.deliveries import deliver_all
from loftq_cli.checkpoint.journal import Journal, Subject, subject_in
from loftq_cli.checkpoint.source import file_hashes
from loftq_cli.conversion.engine import Conversion
from loftq_cli.conversion.jobs import Held, claim, jobs
from loftq_cli.conversion.room import check_memory_for
from loftq_cli.conversion.sharing import Sharing, held, make_room
from loftq_cli.conversion.subject import subject
from loftq_cli.conversion.workspace import ConversionWorkspace
from loftq_cli.errors import EnvironmentFailure, InputError, LoftqError, ScaleRangeError, UsageError
from loftq_cli.machine import introduction, launched
from loftq_cli.machine.group import Group
from loftq_cli.machine.launched import Place
from loftq_cli.machine.meeting import JOINING, PAUSE
from loftq_cli.machine.messages import read, told
from loftq_cli.machine.observer import Observer
from loftq_cli.planning.decomposer import threads
from loftq_cli.planning.make import with_fallback, with_widths
from loftq_cli.planning.plan import Plan
from loftq_cli.settings import maps

SIGHT = 60.0
"""Seconds until what rank 0 wrote is to be seen by every host: network file systems remember for a
while that there was nothing."""
_STOP = 1 << 40  # beyond every list of jobs


def asked(*, part: bool, discard_shards: bool, texts: bool) -> Place | None:
    """Where this process stands among several; None if it is alone. Raises UsageError for what
    several cannot do."""
    place = launched.place()
    if place is None:
        return None
    for given, option, why in (
        (part, "--part", "it is for processes that do not know of each other"),
        (discard_shards, "--discard-shards", "every process reads from all shards"),
        (texts, "--calibrate-text", "it is for one process"),
    ):
        if given:
            raise UsageError(
                f"{option} is not for several processes ({place}): {why}",
                hint="use `loftq calibrate`, convert --stats and `loftq refine`: each takes several"
                if texts
                else "leave the option out, or unset RANK and WORLD_SIZE",
            )
    return place


def refuse_several(command: str) -> None:
    """Raise UsageError if this is one of several processes: ``command`` is for one."""
    place = launched.place()
    if place is not None:
        raise UsageError(
            f"loftq {command} runs in one process, and this is {place}",
            hint="start it without torchrun or srun, or unset RANK and WORLD_SIZE",
        )


def take_turn(group: Group) -> None:
    """Wait until rank 0 has made its plan: what it brings from the hub is there then."""
    if group.place.rank and group.wait_for("planned") is None:
        raise EnvironmentFailure(f"{group.place}: rank 0 has ended already", hint="it says why")


def introduce(group: Group, plan: Plan) -> bool:
    """Tell the others what is to be done here, and, as rank 0, refuse who would do something else.
    Whether the values of the source are to be hashed: it is not one file for all, but copies.

    Raises EnvironmentFailure if ranks differ in what changes bytes, naming both.
    """
    ages = [shard.path.stat().st_mtime_ns for shard in plan.source.shards if shard.path.exists()]
    own = {**introduction.about(plan.recipe.as_dict(), file_hashes(plan.source)), "ages": ages}
    if group.place.rank:
        group.introduce(own)
        return False
    group.say("planned", {})
    others = group.gather("about", patience=JOINING)
    group.refuse_differing(own, others)
    if plan.source.revision is not None:  # each host has its own copy, or will have
        return any(other["host"] != group.host for other in others.values())
    return any(other["ages"] != ages for other in others.values())


@dataclass
class Helpers:
    """What rank 0 has in the others. ``hashes``: see :func:`introduce`."""

    group: Group
    hashes: bool
    _rounds: int = 0

    def work(
        self, plan: Plan, workspace: ConversionWorkspace, identity: Subject, observer: Observer
    ) -> None:
        """Have everything done of ``plan`` that is not finished yet, by all.

        Raises what went wrong with rank 0 or with another, and EnvironmentFailure if others got
        lost: then what these had begun is left.
        """
        group, number = self.group, self._rounds
        self._rounds += 1
        _deliver(group, number, plan, observer)
        make_room(workspace)
        found = jobs(plan)
        with Journal(workspace.journal, identity, workspace.others()) as journal:
            before = Held(journal.units, journal.shards)
            done = [job for job in found if before.has(job)]
            observer.begin(sum(job.cost for job in found))
            observer.count(sum(len(job.matrices) for job in found), "matrices")
            observer.skip(sum(job.cost for job in done))
            shared = _Progress(group, number, observer)
            if len(done) < len(found):
                observer.note(f"{group.place.size} processes share the work")
            order = {
                "recipe": plan.recipe.as_dict(),
                "fingerprint": plan.fingerprint,
                "hashes": self.hashes,
            }
            group.say(f"round/{number}", order)
            own = _attempt(group, number, plan, workspace, journal, before, self.hashes, shared)
            said = group.gather(f"over/{number}", shared.show)
            shared.show()
        observer.end()
        failed = [] if own is None else [own]
        failed += [read(rank, message) for rank, message in sorted(said.items()) if message]
        self._look(failed, plan, held(workspace, identity), observer)

    def _look(
        self,
        failed: Sequence[LoftqError],
        plan: Plan,
        after: Held,
        observer: Observer,
    ) -> None:
        """Raise what keeps the conversion from being finished; what does not is said."""
        for error in failed:  # what is wrong with the source says more than what is with a machine
            if isinstance(error, (InputError, UsageError, ScaleRangeError)):
                raise error
        left = [job for job in jobs(plan) if not after.has(job)]
        lost = sorted(self.group.lost().items())
        if not left:  # the others have done the work of those
            for error in failed:
                observer.note(error.message)
        elif failed:
            raise failed[0]
        elif lost:
            rank, why = lost[0]
            more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
            matrices = sum(len(job.matrices) for job in left)
            raise EnvironmentFailure(
                f"rank {rank} of {self.group.place.size} is gone{more}: {why}; of "
                f"{len(plan.matrices)} matrices {matrices} are not finished",
                hint="run the same command again, it does what is missing",
            )


def assist(group: Group, plan: Plan, path: Path, observer: Observer) -> None:
    """Do what rank 0 says, until it has ended. Raises what goes wrong here, and EnvironmentFailure
    if rank 0 ended otherwise than well."""
    workspace, number = ConversionWorkspace(path), 0
    while (order := group.wait_for(f"round/{number}")) is not None:
        now = _ordered(plan, order)
        error: LoftqError | None = None
        try:
            check_memory_for(now)
            _deliver(group, number, now, observer)
            identity = subject(now)
            _see(group, workspace, identity)
            before = held(workspace, identity)
            whose = f"rank-{group.place.rank}-of-{group.place.size}"
            with Journal(workspace.new_journal(whose), identity) as journal:
                shared = _Progress(group, number, observer)
                error = _attempt(
                    group, number, now, workspace, journal, before, order["hashes"], shared
                )
        except EnvironmentFailure as failure:
            error = failure
        group.say(f"over/{number}/{group.place.rank}", told(error))
        if error is not None and not (isinstance(error, ScaleRangeError) and plan.auto_layout):
            raise error
        number += 1


def _attempt(
    group: Group,
    number: int,
    plan: Plan,
    workspace: ConversionWorkspace,
    journal: Journal,
    before: Held,
    hashes: bool,
    observer: Observer,
) -> LoftqError | None:
    """Do jobs as long as there are any; what went wrong, if anything did. What is wrong with the
    source ends the work of all."""
    try:
        with threads(plan.recipe.threads):
            conversion = Conversion(plan, workspace, observer)
            found = jobs(plan)
            claimed = claim(lambda: group.add(f"next/{number}", 1) - 1, found, before)
            Sharing(conversion, journal, hashes).carry_out(claimed)
    except EnvironmentFailure as error:
        return error
    except LoftqError as error:
        group.add(f"next/{number}", _STOP)
        return error
    return None


def _ordered(plan: Plan, order: dict[str, Any]) -> Plan:
    """``plan``, with what rank 0 has settled since."""
    recipe = order["recipe"]
    if plan.unsettled:
        plan = with_widths(plan, maps.parse("widths", recipe["widths"]))
    if recipe["layout_fallback"] is not None:
        plan = with_fallback(plan)
    assert plan.fingerprint == order["fingerprint"], "rank 0 has compared the plans"
    return plan


def _see(group: Group, workspace: ConversionWorkspace, identity: Subject) -> None:
    """Wait until the journal of rank 0 is to be seen here. Raises EnvironmentFailure if it does not
    come: the directory is another one."""
    until = time.monotonic() + SIGHT
    while True:
        found = subject_in(workspace.journal)
        if found is not None and found.fingerprint == identity.fingerprint:
            return
        if time.monotonic() > until:
            raise EnvironmentFailure(
                f"{group.place} on {group.host}: {workspace.partial} is not what rank 0 writes to",
                hint="choose an --output on a file system that all hosts share",
            )
        time.sleep(PAUSE)


def _deliver(group: Group, number: int, plan: Plan, observer: Observer) -> None:
    """Have a model of the hub on every host, brought there by one process each."""
    if plan.source.revision is None:
        return
    key = f"here/{number}/{group.host}"
    if group.place.local_rank == 0:
        deliver_all(plan.source, observer)
        group.say(key, {})
    else:
        until = time.monotonic() + JOINING
        # Whoever brings it may get lost: then each of them sees to it alone.
        while group.heard(key) is None and time.monotonic() < until:
            time.sleep(PAUSE)
        deliver_all(plan.source, observer)


@dataclass
class _Progress(Observer):
    """Counts what all processes have done; that of rank 0 shows it to ``observer``."""

    group: Group
    number: int
    observer: Observer
    _amount: int = 0
    _finished: int = field(default=0)

    def working_on(self, name: str) -> None:
        self.observer.working_on(name)

    def advance(self, amount: int) -> None:
        self.group.add(f"amount/{self.number}", amount)
        self.show()

    def finished(self, told: str = "") -> None:
        self.group.add(f"finished/{self.number}", 1)

    def note(self, text: str) -> None:
        self.observer.note(text)

    def detail(self, text: str) -> None:
        self.observer.detail(text)

    def show(self) -> None:
        """Tell of what all have done since it was last told of."""
        if self.group.place.rank:
            return
        finished = self.group.add(f"finished/{self.number}", 0)
        for _ in range(finished - self._finished):
            self.observer.finished()
        amount = self.group.add(f"amount/{self.number}", 0)
        self.observer.advance(amount - self._amount)
        self._amount, self._finished = amount, finished
