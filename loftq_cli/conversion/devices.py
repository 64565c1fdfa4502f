"""Several devices that share a conversion: a thread and a stream for each, the largest first.

One thread reads and one writes, as for one device (overlap.py); between them every device has a
matrix that it works on and one that waits for it, so that none stands still while the next is read.
Which device converts which matrix changes no byte: nothing is handed from one matrix to the next.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol, TypeVar, cast

import torch

from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.machine.peak_memory import peak_host_bytes
from loftq_cli.machine.threads import Task, Worker, settle


class Sized(Protocol):
    """An item of a source."""

    tensor: StoredTensor

    @property
    def elements(self) -> int:
        """Of the matrix that it is; 0 if it is none."""


_Item = TypeVar("_Item", bound=Sized)
_Result = TypeVar("_Result")
_AHEAD = 2  # matrices of a device: the one that it works on, and the next
_END = object()


def held(devices: Sequence[torch.device]) -> int:
    """Matrices of the source that are in the host's memory at most."""
    return 2 if len(devices) == 1 else (_AHEAD + 1) * len(devices) + 2


def environment(devices: Sequence[torch.device], seconds: float) -> dict[str, Any]:
    """What the manifest says of a run on them, which took so long."""
    cards = [device for device in devices if device.type == "cuda"]
    counts = Counter(torch.cuda.get_device_name(device) for device in cards)
    names = (f"{count} x {name}" if count > 1 else name for name, count in counts.items())
    return {
        "torch": torch.__version__,
        "device": ", ".join(names) or "cpu",
        "seconds": round(seconds, 3),
        "peak_host_bytes": peak_host_bytes(),
        "peak_device_bytes": max(map(torch.cuda.max_memory_allocated, cards), default=0),
    }


def converted(
    items: Iterator[_Item],
    devices: Sequence[torch.device],
    announce: Callable[[str], None],
    convert: Callable[[_Item, torch.device], _Result],
    threads: int,
) -> Iterator[tuple[_Item, _Result | None]]:
    """Every item and what ``convert`` made of it on one of the ``devices``, as soon as that is
    there; None for items that have no ``elements``, which are not converted.

    ``announce`` is called with the name of each as it was read. ``threads``: of the CPU, for what
    is done there. What a conversion raises is raised when those that had begun are through.
    """
    if len(devices) == 1:
        for item in items:
            announce(item.tensor.name)
            yield item, (convert(item, devices[0]) if item.elements else None)
            del item  # not to be held while the next one is waited for
        return
    sharing = _Sharing(items, devices, announce, convert, threads)
    try:
        yield from sharing.run()
    finally:
        sharing.end()


class _Sharing(Generic[_Item, _Result]):
    def __init__(
        self,
        items: Iterator[_Item],
        devices: Sequence[torch.device],
        announce: Callable[[str], None],
        convert: Callable[[_Item, torch.device], _Result],
        threads: int,
    ) -> None:
        self._items = items
        self._announce = announce
        self._convert = convert
        self._threads = threads
        self._workers = {device: Worker() for device in devices}
        self._given: dict[torch.device, list[tuple[_Item, Task[_Result]]]]
        self._given = {device: [] for device in devices}
        self._waiting: list[_Item] = []  # the smallest first
        self._bell: SimpleQueue[torch.device] = SimpleQueue()
        self._error: Exception | None = None

    def run(self) -> Iterator[tuple[_Item, _Result | None]]:
        over = False
        while True:
            self._give()
            enough = over or self._error is not None or len(self._waiting) >= len(self._workers)
            if enough and not any(self._given.values()):
                break
            try:
                device = self._bell.get(block=enough)
            except Empty:
                item = cast(_Item, next(self._items, _END))
                if item is _END:
                    over = True
                    continue
                self._announce(item.tensor.name)
                if item.elements:
                    bisect.insort(self._waiting, item, key=_elements)
                else:
                    yield item, None
                continue
            item, task = self._given[device].pop(0)
            try:
                result = task.result()
            except Exception as error:
                self._stop(error)
            else:
                yield item, result
                del result
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Wait for what has begun, and for the threads to be over."""
        settle([task for given in self._given.values() for _, task in given])
        for worker in self._workers.values():
            worker.end()

    def _give(self) -> None:
        """What waits to those that have the least to do."""
        while self._waiting:
            device = min(self._given, key=lambda device: len(self._given[device]))
            if len(self._given[device]) == _AHEAD:
                return
            item = self._waiting.pop()
            task = Task(self._call(item, device))
            self._given[device].append((item, task))
            self._workers[device].submit(task)

    def _call(self, item: _Item, device: torch.device) -> Callable[[], _Result]:
        def call() -> _Result:
            try:
                torch.set_num_threads(self._threads)  # OpenMP keeps a number for every thread
                with torch.cuda.device(device):
                    return self._convert(item, device)
            finally:
                self._bell.put(device)

        return call

    def _stop(self, error: Exception) -> None:
        """Begin nothing any more; the first error is the one that counts."""
        self._error = self._error or error
        self._waiting.clear()
        for device, given in self._given.items():
            self._given[device] = [(item, task) for item, task in given if not task.cancel()]


def _elements(item: Sized) -> int:
    return item.elements
