"""Real processes that are killed, interrupted and raced at random moments."""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.whole.crash import processes
from tests.whole.crash.conversions import Conversion, wait_for_work
from tests.whole.crash.stress import STRESS, tell, times
from tests.whole.crash.test_kill import journal_entries


def test_killed_at_random_moments(conversion: Conversion, scratch: Path) -> None:
    chance = random.Random(0)
    caught: Counter[str] = Counter()
    latest = conversion.seconds
    for _ in range(times(12, 300)):
        work = scratch / "work"
        work.mkdir()
        running = processes.Running(conversion.arguments(work / "out"), scratch)
        wait_for_work(running, work / ".out.loftq-partial")
        time.sleep(chance.uniform(0, latest))
        running.send(signal.SIGKILL)
        code = running.end().code
        assert code in (0, -signal.SIGKILL)
        entries = len(journal_entries(work / "out"))
        moment = "after the end" if code == 0 else "before" if not entries else "during"
        # How fast it is depends on who else is there.
        latest *= {"after the end": 0.8, "during": 1.0, "before": 1.2}[moment]
        caught[f"killed {moment} the first tensor" if moment == "before" else moment] += 1
        conversion.finish(work / "out")
    tell(", ".join(f"{moment}: {count}" for moment, count in sorted(caught.items())))
    assert caught["during"]


def test_killed_ten_times_in_one_conversion(conversion: Conversion, scratch: Path) -> None:
    chance = random.Random(0)
    latest = conversion.seconds / 8
    done = attempts = 0
    while done < times(1, 20):
        attempts += 1
        assert attempts < 100
        work = scratch / "work"
        work.mkdir()
        kills = 0
        while kills < 10:
            running = processes.Running(conversion.arguments(work / "out"), scratch)
            wait_for_work(running, work / ".out.loftq-partial")
            time.sleep(chance.uniform(0, latest))
            running.send(signal.SIGKILL)
            if running.end().code == 0:  # it got through: again, with less time
                latest *= 0.7
                break
            kills += 1
        done += kills == 10
        conversion.finish(work / "out")
    tell(f"{done} conversions killed ten times, {attempts - done} that got through before")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_at_random_moments(
    number: signal.Signals, conversion: Conversion, scratch: Path
) -> None:
    chance = random.Random(0)
    slowest, interrupted, latest = 0.0, 0, conversion.seconds
    for attempt in itertools.count(1):
        work = scratch / "work"
        work.mkdir()
        running = processes.Running(conversion.arguments(work / "out"), scratch)
        wait_for_work(running, work / ".out.loftq-partial")
        time.sleep(chance.uniform(0, latest))
        sent = time.monotonic()
        running.send(number)
        before = len(journal_entries(work / "out"))
        ended = running.end()
        if not (work / "out").exists():
            slowest = max(slowest, time.monotonic() - sent)
            interrupted += 1
            assert ended.code == 128 + number
            assert ended.stdout == ""
            line = f"interrupted by {number.name} (run the same command again to resume)"
            assert ended.stderr.splitlines()[-1] == f"loftq: error: {line}"
            assert "Traceback" not in ended.stderr
            # The matrix that was worked on, the one before it, and what is copied with them.
            assert len(journal_entries(work / "out")) <= before + 5
        else:
            latest *= 0.7  # it got through
        conversion.finish(work / "out")
        if interrupted and attempt >= times(8, 100):
            break
        assert attempt < 1000
    tell(f"{number.name}: {interrupted} interrupted, the slowest ended after {slowest:.2f} s")


def test_of_several_at_once_one_wins(conversion: Conversion, scratch: Path) -> None:
    codes: Counter[int] = Counter()
    for _ in range(times(3, 30)):
        work = scratch / "work"
        work.mkdir()
        arguments = conversion.arguments(work / "out")
        runnings = [processes.Running(arguments, scratch) for _ in range(4)]
        ended = [running.end() for running in runnings]
        # Who comes late finds that all is done, and says so.
        assert {each.code for each in ended} <= {0, 4}
        worked = [each for each in ended if each.code == 0 and "nothing to do" not in each.stderr]
        assert len(worked) == 1
        for each in ended:
            if each.code == 4:
                assert "another process is converting to it" in each.stderr
        codes.update(each.code for each in ended)
        conversion.finish(work / "out")
    tell(f"exit codes: {dict(codes)}")
    assert codes[4] or not STRESS
