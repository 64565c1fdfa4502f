"""Parts of a conversion, for processes that cannot ask each other: which there are, which are
missing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.conversion.jobs import Held, Job, jobs, shares
from loftq_cli.conversion.workspace import ConversionWorkspace
from loftq_cli.errors import OutputConflictError, UsageError, listed
from loftq_cli.planning.plan import Plan

MOST = 10_000
_JOURNAL = re.compile(r"part-(\d+)-of-(\d+)\.")
_LISTED = 12  # numbers of parts in a message


@dataclass(frozen=True)
class Part:
    """One of ``count`` fixed shares of a conversion; ``number`` counts from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"part {self.number} of {self.count}"

    @property
    def journal(self) -> str:
        """What the journals of this part are called."""
        return f"part-{self.number}-of-{self.count}"

    def of(self, plan: Plan) -> list[Job]:
        """What this part does of ``plan``, the largest first."""
        return shares(jobs(plan), self.count)[self.number - 1]


def asked(text: str | None, *, discard_shards: bool, texts: bool) -> Part | None:
    """The part that is asked for. Raises UsageError for what cannot be done in parts."""
    if text is None:
        return None
    for given, option, why in (
        (discard_shards, "--discard-shards", "every part reads from all shards"),
        (texts, "--calibrate-text", "measuring is not dealt out"),
    ):
        if given:
            raise UsageError(
                f"{option} and --part exclude each other: {why}",
                hint="do that first, in one process" if texts else "leave the option out",
            )
    return parsed(text)


def parsed(text: str) -> Part:
    """``3/8``. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    found = None if match is None else Part(int(match[1]), int(match[2]))
    if found is None or not 1 <= found.number <= found.count <= MOST:
        raise UsageError(
            f"--part {text}: not a part", hint=f"I/N with I from 1 to N, and N up to {MOST}: 3/8"
        )
    return found


def refuse_other_parts(workspace: ConversionWorkspace, part: Part) -> None:
    """Raise OutputConflictError if the work is dealt out in another number of parts already."""
    others = _counts(workspace.others()) - {part.count}
    if others:
        raise OutputConflictError(
            f"{workspace.partial} holds parts of {max(others)}, and this is {part}",
            hint=f"go on with --part I/{max(others)}, or remove it to begin anew",
        )


def refuse_missing(workspace: ConversionWorkspace, plan: Plan, held: Held) -> None:
    """Raise OutputConflictError if the work was dealt out in parts and some are not finished."""
    for count in _counts(workspace.others()):
        missing = [
            str(number)
            for number, share in enumerate(shares(jobs(plan), count), 1)
            if not all(held.has(job) for job in share)
        ]
        if missing:
            named = listed(missing, _LISTED)
            raise OutputConflictError(
                f"{workspace.final}: {'parts' if len(missing) > 1 else 'part'} {named} of {count} "
                f"{'are' if len(missing) > 1 else 'is'} not finished",
                hint=f"run `--part {missing[0]}/{count}`"
                + (" and the others" if len(missing) > 1 else "")
                + ", then this command again",
            )


def _counts(journals: Sequence[Path]) -> set[int]:
    """In how many parts the work is dealt out, by the names of the parts' journals."""
    return {int(match[2]) for path in journals if (match := _JOURNAL.match(path.name))}
