"""Reading one item ahead and writing one behind, each in a thread of its own.

Reading, hashing and writing release the interpreter's lock, so they run beside the computation.
One item and no more: memory stays bounded by what is worked on and its neighbours. However often
Ctrl-C is pressed, a thread does not outlive the files that it works on, nor the lock on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar, cast

from loftq_cli.machine.threads import Task, Worker

_Item = TypeVar("_Item")
_END = object()


class ReadAhead(Generic[_Item]):
    """Iterates over ``items``; while one is worked on the next is made. What making it raises is
    raised when its turn comes."""

    def __init__(self, items: Iterator[_Item]) -> None:
        self._items = items
        self._worker = Worker()

    def __enter__(self) -> Iterator[_Item]:
        return self._iterate()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._worker.end()

    def _iterate(self) -> Iterator[_Item]:
        coming = self._worker.submit(Task(self._make))
        while (item := coming.result()) is not _END:
            coming = self._worker.submit(Task(self._make))
            yield item
            del item  # not to be held while the next one is waited for

    def _make(self) -> _Item:
        return next(self._items, cast(_Item, _END))


class WriteBehind:
    """Runs what it is given, in order, while the caller goes on; at most one task is waiting or
    running. What a task raises is raised by the next call, or at the end."""

    def __init__(self) -> None:
        self._worker = Worker()
        self._last: Task[None] | None = None

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._worker.end()  # what was computed is written, whatever went wrong since
        if error is None:
            self.wait()

    def submit(self, task: Callable[[], None]) -> None:
        self.wait()
        self._last = self._worker.submit(Task(task))

    def wait(self) -> None:
        if self._last is not None:
            last, self._last = self._last, None
            last.result()
