"""Workers: what they run, and that no interrupt of the main thread locks them up."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap
import threading

import pytest

from loftq_cli.machine.threads import Task, Worker, settle, side_by_side

_PATIENCE = 30.0  # seconds until a test that hangs is given up


def test_tasks_run_in_order_in_one_other_thread():
    worker = Worker()
    seen: list[int] = []

    def work(number: int) -> int:
        seen.append(threading.get_ident())
        return number

    tasks = [worker.submit(Task(functools.partial(work, number))) for number in (1, 2)]
    assert [task.result() for task in tasks] == [1, 2]
    assert len(set(seen)) == 1
    assert threading.get_ident() not in seen
    worker.end()
    assert not [t for t in threading.enumerate() if t.ident == seen[0]]


def test_what_a_task_raises_is_raised_where_its_result_is_wanted():
    worker = Worker()
    task = worker.submit(Task(lambda: 1 // 0))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            task.result()
    assert worker.submit(Task(lambda: 7)).result() == 7
    worker.end()


def test_what_has_begun_is_waited_for_and_the_rest_is_not_made():
    worker, gate, made = Worker(), threading.Event(), []
    begun = threading.Event()

    def slow() -> None:
        begun.set()
        gate.wait(_PATIENCE)
        made.append("slow")

    class Last(Task[None]):
        def cancel(self) -> bool:
            gate.set()  # those before it are cancelled by now
            return super().cancel()

    tasks = [Task(slow), Task(lambda: made.append("waiting")), Last(lambda: made.append("nowhere"))]
    for task in tasks[:2]:
        worker.submit(task)
    assert begun.wait(_PATIENCE)
    settle(tasks)
    assert made == ["slow"]
    assert [task.cancel() for task in tasks] == [False, True, True]
    worker.end()
    assert made == ["slow"]


@pytest.mark.parametrize("what", ["overlap", "divide"])
def test_an_interrupt_at_any_instruction_locks_nothing_up(what):
    """KeyboardInterrupt is raised at every bytecode of the main thread in turn, as a signal does,
    in whatever Python code it is in."""
    code = textwrap.dedent(
        """
        import sys
        import torch
        from loftq_cli.conversion.overlap import ReadAhead, WriteBehind
        from loftq_cli.kernels import native

        torch.set_num_threads(3)

        def step():
            pass

        def overlap():
            with WriteBehind() as behind, ReadAhead(iter(range(3))) as ahead:
                for _ in ahead:
                    behind.submit(step)

        def divide():
            native.divide(lambda first, last: step(), 12)

        def count(frame, event, argument):
            frame.f_trace_opcodes = True
            if event == "opcode":
                left[0] -= 1
                if left[0] == 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return count

        work = {"overlap": overlap, "divide": divide}[sys.argv[1]]
        work()
        number = interrupted = 0
        while True:
            number += 1
            left = [number]
            sys.settrace(count)
            try:
                work()
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                sys.settrace(None)
            if left[0] > 0:
                break
        assert interrupted > 100
        print(interrupted)
        """
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, what],
        capture_output=True,
        text=True,
        timeout=4 * _PATIENCE,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_is_done_side_by_side_comes_in_order(count: int) -> None:
    threads = set()

    def square(number: int) -> int:
        threads.add(threading.get_ident())
        return number * number

    assert side_by_side(square, range(20), count) == [number**2 for number in range(20)]
    assert len(threads) <= count
    assert side_by_side(square, [], count) == []


def test_what_fails_first_of_those_side_by_side_is_raised() -> None:
    def fail(number: int) -> int:
        if number % 3 == 2:
            raise ValueError(str(number))
        return number

    with pytest.raises(ValueError, match=r"^2$"):
        side_by_side(fail, range(9), 3)
