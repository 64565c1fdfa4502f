"""Several processes that share a conversion: the bytes of one, whoever of them dies when."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import loftq_cli
from loftq_cli.checkpoint.output import open_output, verify
from loftq_cli.conversion import ranks
from loftq_cli.machine import meeting
from tests.support import checkpoints
from tests.whole.crash import several
from tests.whole.crash.conversions import Conversion, wait_for_work
from tests.whole.crash.stress import STRESS, tell, times

QUICK = ("--rank", "4", "--iters", "1", "-t", "1", "--layout", "loftq")


@pytest.fixture
def model(scratch: Path) -> Path:
    return checkpoints.write(scratch / "model", checkpoints.llama(layers=2), cuts=(6, 13))


def finished(output: Path) -> set[str]:
    """The matrices that any journal beside ``output`` calls finished."""
    partial = output.parent / f".{output.name}.loftq-partial"
    found = set()
    for path in [partial / "journal", *partial.glob("journals/*")]:
        for line in path.read_text().splitlines() if path.exists() else []:
            found.add(json.loads(line).get("tensor"))
    return found - {None}


def test_two_ranks_make_what_one_process_makes(conversion: Conversion, scratch: Path) -> None:
    output = scratch / "work/out"
    output.parent.mkdir()
    first, second = several.run([*conversion.arguments(output), "-v"], scratch)
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    assert "wrote" in first.stdout
    assert second.stdout == ""
    done = [
        {line.split(": ")[1] for line in each.stderr.splitlines() if ": converted" in line}
        for each in (first, second)
    ]
    assert not done[0] & done[1]
    assert len(done[0] | done[1]) == 14
    # Each says which it is.
    assert all(line.startswith("loftq[1]: ") for line in second.stderr.splitlines())
    assert checkpoints.comparable(output) == conversion.expected
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    again = several.run(conversion.arguments(output), scratch)
    assert [each.code for each in again] == [0, 0]
    assert "nothing to do" in again[0].stderr


def kill_some(
    conversion: Conversion, work: Path, scratch: Path, which: int, moment: float
) -> tuple[list[int], int]:
    """Two ranks of which one is killed so many seconds after work began: their exit codes, and how
    many tensors were finished when both were over."""
    work.mkdir()
    running = several.start(conversion.arguments(work / "out"), scratch)
    wait_for_work(running[0], work / ".out.loftq-partial")
    time.sleep(moment)
    running[which].send(signal.SIGKILL)
    ended = [each.end() for each in running]
    survivor = ended[1 - which]
    if ended[which].code and survivor.code:
        (line,) = survivor.stderr.splitlines()[-1:]
        said = "rank 1 of 2 is gone" if which else "rank 1 of 2: rank 0"
        assert said in line, survivor.stderr
        assert survivor.code == 5
        assert "Traceback" not in survivor.stderr
    return [each.code for each in ended], len(finished(work / "out"))


@pytest.mark.parametrize(("which", "count"), [(1, 30), (0, 10)])
def test_killed_ranks_leave_what_the_next_run_finishes(
    which: int, count: int, conversion: Conversion, scratch: Path
) -> None:
    """The next run is one process, or several again."""
    chance = random.Random(which)
    caught: Counter[str] = Counter()
    for attempt in range(times(1, count)):
        work = scratch / "work"
        moment = chance.uniform(0, conversion.seconds)
        codes, units = kill_some(conversion, work, scratch, which, moment)
        assert codes[which] in (0, -signal.SIGKILL)
        assert codes[1 - which] in (0, 5)
        during = codes[which] != 0 and not (work / "out").exists()
        caught["with finished tensors" if during and units else "too late or too early"] += 1
        if (work / "out").exists():
            verify(open_output(work / "out"))
        elif attempt % 2:
            again = several.run(conversion.arguments(work / "out"), scratch)
            assert [each.code for each in again] == [0, 0]
        conversion.finish(work / "out")
    tell(f"rank {which} killed: " + ", ".join(f"{k}: {v}" for k, v in sorted(caught.items())))
    assert caught["with finished tensors"] or not STRESS


def test_what_is_wrong_with_the_source_ends_all_of_them_with_its_line(scratch: Path) -> None:
    tensors = checkpoints.llama()
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan
    model = checkpoints.write(scratch / "broken", tensors)
    first, second = several.run(["convert", model, "-o", scratch / "out", *QUICK], scratch)
    assert first.code == 3
    assert second.code in (3, 5)
    assert "model.layers.0.mlp.up_proj.weight" in first.stderr
    assert not (scratch / "out").exists()


def test_a_layout_that_does_not_hold_a_scale_is_left_by_all(scratch: Path) -> None:
    tensors = checkpoints.llama()
    tensors["model.layers.0.self_attn.v_proj.weight"] *= 1e9
    model = checkpoints.write(scratch / "small", tensors)
    settings = ["--rank", "4", "--iters", "1", "-t", "1", "--bits", "2"]
    ended = several.run(["convert", model, "-o", scratch / "out", *settings], scratch)
    assert [each.code for each in ended] == [0, 0], [each.stderr for each in ended]
    loftq_cli.convert(model, scratch / "one", rank=4, iters=1, threads=1, bits=2)
    assert checkpoints.comparable(scratch / "out") == checkpoints.comparable(scratch / "one")
    assert open_output(scratch / "out").manifest["recipe"]["layout_fallback"] == "float16-range"


def test_ranks_that_would_not_make_the_same_bytes_are_refused(model: Path, scratch: Path) -> None:
    first, second = several.run(
        ["convert", model, "-o", scratch / "out", *QUICK], scratch, own={1: ["-t", "2"]}
    )
    assert (first.code, second.code) == (5, 5)
    (line,) = [each for each in first.stderr.splitlines() if "error" in each]
    assert "rank 1 (on " in line
    assert "and rank 0 (on " in line
    assert "would not make the same bytes: threads 2 and 1" in line
    assert "rank 0 ended before all was done" in second.stderr
    assert sorted(path.name for path in scratch.iterdir() if path.name[0] != ".") == ["model"]


def test_an_output_that_not_all_see_is_refused(model: Path, scratch: Path) -> None:
    first, second = several.run(
        ["convert", model, *QUICK],
        scratch,
        own={rank: ["-o", scratch / f"host{rank}/out"] for rank in range(2)},
        faults={1: _be_impatient},
    )
    # Rank 0 has nobody to share the work with, and says why.
    assert (first.code, second.code) == (0, 5)
    for each in (first, second):
        assert "host1/.out.loftq-partial is not what rank 0 writes to" in each.stderr


def _be_impatient() -> None:
    ranks.SIGHT = 0.2


def test_a_rank_that_nobody_joins_says_so(model: Path, scratch: Path) -> None:
    arguments: list[str | Path] = ["convert", model, "-o", scratch / "out", *QUICK]
    running = several.start(arguments, scratch, faults=dict.fromkeys(range(2), _be_in_a_hurry))
    running[1].send(signal.SIGKILL)
    running[1].end()
    ended = running[0].end()
    assert ended.code == 5
    assert "rank 1 of 2: not there after" in ended.stderr
    running = several.start(arguments, scratch, faults=dict.fromkeys(range(2), _be_in_a_hurry))
    running[0].send(signal.SIGKILL)
    running[0].end()
    ended = running[1].end()
    assert ended.code == 5
    assert "nobody at 127.0.0.1:" in ended.stderr


def _be_in_a_hurry() -> None:
    meeting.JOINING = 1.0
    vars(ranks)["JOINING"] = 1.0
    time.sleep(0.5)  # until the other one has been killed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--part", "1/2"], "--part is not for several processes"),
        (["--discard-shards"], "--discard-shards is not for several processes"),
        (["--calibrate-text", "notes.txt"], "--calibrate-text is not for several processes"),
    ],
)
def test_what_several_cannot_do_is_refused(
    words: list[str], said: str, model: Path, scratch: Path
) -> None:
    for ended in several.run(["convert", model, *words], scratch):
        assert ended.code == 2
        assert said in ended.stderr


def test_adapting_is_for_one_process(scratch: Path) -> None:
    for ended in several.run(["adapt", "a", "--source", "b", "-o", "c"], scratch):
        assert ended.code == 2
        assert "loftq adapt runs in one process, and this is rank" in ended.stderr


def test_a_dry_run_is_that_of_rank_0(model: Path, scratch: Path) -> None:
    first, second = several.run(["convert", model, "--dry-run", "--json", *QUICK], scratch)
    assert (first.code, second.code) == (0, 0)
    assert json.loads(first.stdout)["recipe"]["threads"] == 1
    assert (second.stdout, second.stderr) == ("", "")
