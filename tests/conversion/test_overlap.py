"""Reading ahead and writing behind."""

from __future__ import annotations

import threading

import pytest

from loftq_cli.conversion.overlap import ReadAhead, WriteBehind
from loftq_cli.machine.threads import Worker

_PATIENCE = 30.0  # seconds until a test that hangs is given up


def test_items_come_in_order():
    with ReadAhead(iter(range(50))) as ahead:
        assert list(ahead) == list(range(50))


def test_one_item_is_made_ahead_and_no_more():
    made: list[int] = []
    arrived = threading.Semaphore(0)

    def items():
        for number in range(5):
            made.append(number)
            arrived.release()
            yield number

    with ReadAhead(items()) as ahead:
        for taken in ahead:
            expected = min(taken + 2, 5)
            while len(made) < expected:
                assert arrived.acquire(timeout=_PATIENCE)
            assert len(made) == expected


def test_an_error_in_reading_comes_in_its_turn():
    def items():
        yield 1
        yield 2
        raise OSError("torn")

    with ReadAhead(items()) as ahead:
        assert [next(ahead), next(ahead)] == [1, 2]
        with pytest.raises(OSError, match="torn"):
            next(ahead)


def test_tasks_run_in_order_beside_the_caller():
    gate = threading.Event()
    done: list[object] = []
    with WriteBehind() as behind:
        behind.submit(lambda: done.append(gate.wait(_PATIENCE)))
        assert done == []  # the caller was not held up
        gate.set()
        behind.submit(lambda: done.append("second"))
    assert done == [True, "second"]


def test_an_error_in_writing_is_raised_by_the_next_call_or_at_the_end():
    def fail() -> None:
        raise OSError("full")

    with WriteBehind() as behind:
        behind.submit(fail)
        with pytest.raises(OSError, match="full"):
            behind.submit(lambda: None)
    with pytest.raises(OSError, match="full"), WriteBehind() as behind:
        behind.submit(fail)


def test_what_was_handed_over_is_written_when_the_caller_fails():
    done = []

    def interrupted() -> None:
        with WriteBehind() as behind:
            behind.submit(lambda: done.append("written"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == ["written"]


@pytest.mark.parametrize("kind", [ReadAhead, WriteBehind])
def test_impatience_does_not_leave_the_thread_to_itself(kind, monkeypatch):
    """Ctrl-C again while what was handed over is being written: the files must not be closed."""
    gate, done = threading.Event(), []

    def work():
        gate.wait(_PATIENCE)
        done.append("written")
        return iter(())

    original, calls = Worker._end, []

    def end(self):
        calls.append(self)
        if len(calls) < 3:
            raise KeyboardInterrupt
        gate.set()
        original(self)

    def interrupted():
        if kind is WriteBehind:
            with WriteBehind() as behind:
                behind.submit(work)
                raise KeyboardInterrupt
        with ReadAhead(iter(())):
            raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "_end", end)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(calls) == 3
    assert done == (["written"] if kind is WriteBehind else [])
