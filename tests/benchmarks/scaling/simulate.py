"""Many devices that share a conversion and a file system, simulated.

What there is to do, in which order, and who takes what when are the converter's own: its plan of a
checkpoint, its jobs and its counter. A device reads the next job while it computes one and writes
the one before, as the converter does. All transfers share the bandwidth of the file system evenly.
In the end rank 0 hashes what was written, as the converter does.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from loftq_cli.checkpoint.encoded import EncodedTensor
from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.conversion.jobs import Held, Job, claim
from loftq_cli.planning.plan import Plan
from tests.benchmarks.scaling.costs import Costs

HASHES = 2
"""How often rank 0 hashes the output: the tensors, and the files."""
THREADS = 8
"""In which it does so."""


@dataclass(frozen=True)
class Load:
    """What a job takes: bytes to read and to write, and seconds between."""

    read: int
    written: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """``seconds`` of everything, of it the ``last`` of rank 0 alone; and the shares of the time
    before in which devices computed and in which the file system was busy."""

    seconds: float
    last: float
    computing: float
    transferring: float

    @property
    def limit(self) -> str:
        """What it waits for most."""
        if self.last > self.seconds / 4:
            return "rank 0, which hashes the output"
        if self.transferring > 0.9:
            return "the file system"
        return "the devices" if self.computing > 0.9 else "the last jobs"


def load(plan: Plan, job: Job, costs: Costs) -> Load:
    """What ``job`` of ``plan`` takes at these costs."""
    if not job.matrices:
        size = job.shard.source.header.size
        return Load(size, sum(tensor.nbytes for tensor in job.kept), size * costs.byte)
    items = [plan.matrices[tensor.name] for tensor in job.matrices]
    specs = [spec for item in items for spec in (*item.specs, *item.adapter_specs)]
    return Load(
        sum(_stored(tensor) for tensor in job.matrices),
        sum(spec.nbytes for spec in specs),
        sum(costs.matrices[item.matrix.shape[0], item.matrix.shape[1]] for item in items),
    )


def _stored(tensor: StoredTensor) -> int:
    if isinstance(tensor, EncodedTensor):
        return sum(part.tensor.nbytes for part in (tensor.main, *tensor.others.values()))
    return tensor.nbytes


@dataclass
class _Device:
    """Reads one ahead and writes one behind: ``reading``, ``ready`` to be computed, ``computing``,
    ``done`` computing and waiting for the write before, ``writing``."""

    turns: Iterator[Job]
    reading: Load | None = None
    ready: Load | None = None
    computing: Load | None = None
    done: Load | None = None
    writing: Load | None = None


@dataclass
class _Transfers:
    """Transfers that share ``bandwidth`` evenly: each ends when all have been served so much."""

    bandwidth: float
    served: float = 0.0
    waiting: list[tuple[float, int, int, str]] = field(default_factory=list)
    busy: float = 0.0
    _order: Iterator[int] = field(default_factory=itertools.count)

    def begin(self, nbytes: int, device: int, kind: str) -> None:
        heapq.heappush(self.waiting, (self.served + nbytes, next(self._order), device, kind))

    def next_end(self) -> float:
        """Seconds until one ends, if none begins before."""
        if not self.waiting:
            return float("inf")
        return (self.waiting[0][0] - self.served) * len(self.waiting) / self.bandwidth

    def pass_time(self, seconds: float) -> None:
        if self.waiting:
            self.served += seconds * self.bandwidth / len(self.waiting)
            self.busy += seconds


def simulate(
    jobs: Sequence[Job], loads: dict[int, Load], devices: int, bandwidth: float, byte: float
) -> Outcome:
    """The conversion of ``jobs`` by so many devices over ``bandwidth`` bytes a second; ``loads`` by
    the identity of the job, ``byte``: seconds of hashing one."""
    counter = itertools.count()
    before = Held({}, {})
    all_devices = [_Device(claim(lambda: next(counter), jobs, before)) for _ in range(devices)]
    transfers = _Transfers(bandwidth)
    ends: list[tuple[float, int]] = []
    now = computed = 0.0

    def go_on(number: int) -> None:
        """Begin whatever the device can begin now."""
        nonlocal computed
        device = all_devices[number]
        if device.done is not None and device.writing is None:
            device.writing, device.done = device.done, None
            transfers.begin(device.writing.written, number, "write")
        if device.ready is not None and device.computing is None and device.done is None:
            device.computing, device.ready = device.ready, None
            heapq.heappush(ends, (now + device.computing.seconds, number))
            computed += device.computing.seconds
        if device.reading is None and device.ready is None:
            job = next(device.turns, None)
            if job is not None:
                device.reading = loads[id(job)]
                transfers.begin(device.reading.read, number, "read")

    for number in range(devices):
        go_on(number)
    while ends or transfers.waiting:
        wait = transfers.next_end()
        if ends and ends[0][0] - now <= wait:
            transfers.pass_time(ends[0][0] - now)
            now, number = heapq.heappop(ends)
            device = all_devices[number]
            device.done, device.computing = device.computing, None
        else:
            transfers.pass_time(wait)
            now += wait
            _, _, number, kind = heapq.heappop(transfers.waiting)
            device = all_devices[number]
            if kind == "read":
                device.ready, device.reading = device.reading, None
            else:
                device.writing = None
        go_on(number)
    written = sum(each.written for each in loads.values())
    last = HASHES * written * max(1 / bandwidth, byte / THREADS)
    return Outcome(now + last, last, computed / (devices * now), transfers.busy / now)
