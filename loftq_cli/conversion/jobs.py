"""What a conversion consists of for processes that share it: jobs, each with its cost.

A job is a matrix, or several that are weighted by one entry of full statistics, which takes long
to prepare; or it is what is left of a shard: its contents hashed, and what stays copied.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.checkpoint.journal import ReadShard, Unit
from loftq_cli.conversion.reread import is_as_old
from loftq_cli.planning.plan import Plan, PlannedShard
from loftq_cli.planning.work import reading, work


@dataclass(frozen=True)
class Job:
    """``matrices`` of ``shard`` to convert or, if there are none, the rest of it; ``cost`` in about
    nanoseconds of one core."""

    shard: PlannedShard
    matrices: tuple[StoredTensor, ...]
    kept: tuple[StoredTensor, ...]
    cost: int


@dataclass(frozen=True)
class Held:
    """What journals say is finished, by name."""

    units: dict[str, Unit]
    shards: dict[str, ReadShard]

    def has(self, job: Job) -> bool:
        """Whether all of ``job`` is finished, as far as can be told without reading it again."""
        read = bool(job.matrices) or job.shard.source.name in self.shards
        return read and all(
            tensor.name in self.units and is_as_old(job.shard.source, self.units[tensor.name])
            for tensor in (*job.matrices, *job.kept)
        )


def jobs(plan: Plan) -> list[Job]:
    """Everything that there is to do, the same list in every process: what is left of each shard,
    then the matrices, the largest first. What remains for the end is small, so that nobody waits
    long for anybody, however fast a device is beside the hashing of a shard."""
    found: list[Job] = []
    for shard in plan.shards:
        groups: dict[str, list[StoredTensor]] = {}
        kept = []
        for tensor in shard.source.header.tensors:
            if tensor.name in plan.matrices:
                groups.setdefault(_together(plan, tensor.name), []).append(tensor)
            else:
                kept.append(tensor)
        for matrices in groups.values():
            cost = sum(work(plan, tensor) for tensor in matrices)
            found.append(Job(shard, tuple(matrices), (), cost))
        cost = reading(shard.source.header.size) + sum(work(plan, tensor) for tensor in kept)
        found.append(Job(shard, (), tuple(kept), cost))
    # Stable: equals stay as they lie.
    return sorted(found, key=lambda job: (bool(job.matrices), -job.cost))


def _together(plan: Plan, name: str) -> str:
    held = plan.statistics
    if held is None or name not in held.matrices or held.kind(name) != "full":
        return name
    return held.matrices[name]


def claim(counter: Callable[[], int], found: Sequence[Job], before: Held) -> Iterator[Job]:
    """The job whose turn it is by a ``counter`` that all processes share and that begins at 0,
    again and again, without what was finished ``before``."""
    while (index := counter()) < len(found):
        if not before.has(found[index]):
            yield found[index]


def shares(found: Sequence[Job], count: int) -> list[list[Job]]:
    """``found`` dealt out to ``count`` processes that cannot ask each other: the dearest first,
    each to whom least was given so far. No share is dearer than the least possible by more than a
    third (Graham 1969, LPT)."""
    loads = [(0, number) for number in range(count)]
    dealt: list[list[Job]] = [[] for _ in range(count)]
    for job in sorted(found, key=lambda job: -job.cost):
        load, number = heapq.heappop(loads)
        dealt[number].append(job)
        heapq.heappush(loads, (load + job.cost, number))
    return dealt
