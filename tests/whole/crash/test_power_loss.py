"""Simulated losses of power: whatever becomes of unsynced changes, nothing that counts is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from loftq_cli.machine.durable import write_file
from tests.whole.crash.operations import watched
from tests.whole.crash.power import Disk
from tests.whole.crash.scenarios import Scenario, convert
from tests.whole.crash.stress import tell, times

SEEDS = 200


def left_by(disk: Disk, scratch: Path, seeds: int = 200, count: int | None = None) -> set[str]:
    """Everything that ``f`` may hold after a loss of power; "absent" where there is no such
    file."""
    found = set()
    for seed in range(seeds):
        disk.leave(scratch / "left", random.Random(seed), count)
        path = scratch / "left/f"
        found.add(path.read_text() if path.exists() else "absent")
        shutil.rmtree(scratch / "left")
    return found


@pytest.fixture
def work(scratch: Path) -> Path:
    (scratch / "work").mkdir()
    (scratch / "work/f").write_text("old")
    return scratch / "work"


def test_the_model_loses_what_was_not_synced(work: Path, scratch: Path) -> None:
    disk = Disk(work)
    with watched(work, disk):
        descriptor = os.open(work / "new", os.O_WRONLY | os.O_CREAT, 0o666)
        os.write(descriptor, b"new")
        os.close(descriptor)
        os.replace(work / "new", work / "f")
    assert left_by(disk, scratch) >= {"old", "new", ""}


def test_the_model_keeps_what_was_synced(work: Path, scratch: Path) -> None:
    disk = Disk(work)
    with watched(work, disk):
        write_file(work / "f", b"new")
    assert left_by(disk, scratch) == {"new"}
    during = {
        text for count in range(len(disk.changes)) for text in left_by(disk, scratch, 20, count)
    }
    assert during == {"old", "new"}


def test_the_model_loses_a_synced_file_in_an_unsynced_directory(scratch: Path) -> None:
    work = scratch / "work"
    work.mkdir()
    disk = Disk(work)
    with watched(work, disk):
        descriptor = os.open(work / "f", os.O_WRONLY | os.O_CREAT, 0o666)
        os.write(descriptor, b"new")
        os.fsync(descriptor)
        os.close(descriptor)
    assert left_by(disk, scratch) == {"absent", "new"}


def claimed(work: Path) -> set[str]:
    """The tensors that the journal in ``work`` says are finished."""
    journal = work / ".out.loftq-partial/journal"
    lines = journal.read_bytes().split(b"\n") if journal.exists() else []
    found = set()
    for line in lines:
        try:
            found.add(json.loads(line)["tensor"])
        except (ValueError, KeyError):
            continue  # torn, or of a shard
    return found


@pytest.mark.parametrize("name", ["convert", "convert --overwrite"])
def test_conversions_survive_losses_of_power(
    name: str, learned: dict[str, Scenario], scratch: Path
) -> None:
    """Up to three losses, at random moments of the first run and of those that resume it."""
    scenario = learned[name]
    first = scratch / "first"
    scenario.prepare(first)
    undisturbed = Disk(first)
    with watched(first, undisturbed):
        scenario.command(first)
    losses = resumed = 0
    for seed in range(times(SEEDS)):
        chance = random.Random(seed)
        work = scratch / f"{seed}.1"
        undisturbed.leave(work, chance, chance.randrange(len(undisturbed.changes)))
        losses += 1
        for number in range(2, 2 + chance.choice((0, 0, 1, 2))):
            if scenario.state(work) == scenario.expected:
                break
            disk = Disk(work)
            with watched(work, disk):
                scenario.command(work)
            after = scratch / f"{seed}.{number}"
            disk.leave(after, chance, chance.randrange(len(disk.changes)))
            losses += 1
            shutil.rmtree(work)
            work = after
        state = scenario.state(work)
        set_aside = (work / ".out.loftq-partial/replaced").exists()
        assert state in (scenario.before, scenario.expected) or (state == {} and set_aside), seed
        units = claimed(work)
        recorder = convert(scenario, work)
        # A line of the journal is a promise.
        assert state == scenario.expected or units <= recorder.named("kept"), seed
        resumed += bool(units)
        assert scenario.state(work) == scenario.expected, seed
        assert scenario.left(work) == [], seed
        shutil.rmtree(work)
    tell(f"{name}: {losses} losses of power, {resumed} of them with finished tensors")
    assert resumed > losses // 5
