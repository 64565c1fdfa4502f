"""Threads that an interrupt of the main one cannot lock up.

What threading and concurrent.futures are made of takes locks in Python: KeyboardInterrupt, raised
between two of its bytecodes, can leave one held for ever, and the other thread waiting for it.
Here the two meet only in ``queue.SimpleQueue`` and ``dict.setdefault``, which are C, and whatever
the main thread does can be done again.
"""

from __future__ import annotations

import _thread
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Generic, TypeVar, cast

_T = TypeVar("_T")
_Of = TypeVar("_Of")


class Task(Generic[_T]):
    """A call that a worker makes, unless it is cancelled before."""

    def __init__(self, function: Callable[[], _T]) -> None:
        self._function: Callable[[], _T] | None = function
        self._value: _T | None = None
        self._error: BaseException | None = None
        self._over = False
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._owner: dict[None, str] = {}  # whoever is in it first runs the call, or cancels it

    def run(self) -> None:
        """Make the call; of the worker."""
        function, self._function = self._function, None  # nothing is held that it refers to
        if function is None or self._owner.setdefault(None, "worker") != "worker":
            return
        try:
            self._value = function()
        except BaseException as error:
            self._error = error
        self._over = True
        self._bell.put(None)

    def cancel(self) -> bool:
        """Whether it was in time: the call is not made any more."""
        return self._owner.setdefault(None, "caller") == "caller"

    def wait(self) -> None:
        """Until the call was made; may be interrupted, and called again."""
        while not self._over:
            self._bell.get()

    def result(self) -> _T:
        """What the call returned or raised, once."""
        self.wait()
        if self._error is not None:
            raise self._error
        value, self._value = self._value, None
        return cast(_T, value)


class Worker:
    """A thread that runs tasks in the order in which they come. Without :meth:`end` it waits for
    more until the process ends, which it does not keep from ending."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Task[object] | None] = SimpleQueue()
        self._over = False
        self._bell: SimpleQueue[None] = SimpleQueue()
        _thread.start_new_thread(self._run, ())

    def submit(self, task: Task[_T]) -> Task[_T]:
        self._tasks.put(cast("Task[object]", task))
        return task

    def end(self) -> None:
        """Wait until all tasks have run and the thread is over, however often that is interrupted;
        the last interrupt is raised then."""
        _insist(self._end)

    def _end(self) -> None:
        self._tasks.put(None)
        while not self._over:
            self._bell.get()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task.run()
        self._over = True
        self._bell.put(None)


def side_by_side(function: Callable[[_Of], _T], items: Sequence[_Of], count: int) -> list[_T]:
    """``function`` of each of ``items``, in their order, in up to ``count`` threads. Raises what
    the first one that fails raises."""
    if count < 2 or len(items) < 2:
        return [function(item) for item in items]
    workers = [Worker() for _ in range(min(count, len(items)))]
    tasks = [Task(partial(function, item)) for item in items]
    try:
        for number, task in enumerate(tasks):
            workers[number % len(workers)].submit(task)
        return [task.result() for task in tasks]
    finally:
        settle(tasks)
        for worker in workers:
            worker.end()


def settle(tasks: Sequence[Task[_T]]) -> None:
    """Cancel those ``tasks`` that have not begun, submitted or not, and wait for the others as
    :meth:`Worker.end` does."""

    def wait() -> None:
        begun = [task for task in tasks if not task.cancel()]
        for task in begun:
            task.wait()

    _insist(wait)


def _insist(wait: Callable[[], None]) -> None:
    interruption = None
    while True:
        try:
            wait()
            break
        except KeyboardInterrupt as error:
            interruption = error
    if interruption is not None:
        raise interruption
