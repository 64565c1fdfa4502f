"""Conversions that are killed, interrupted, or run into each other, in real processes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import loftq_cli
from loftq_cli.checkpoint.output import open_output, verify
from loftq_cli.errors import OutputConflictError
from tests.support import checkpoints
from tests.whole.crash import processes

QUICK = ["--rank", "4", "--iters", "2", "-t", "1"]
QUICK_SETTINGS: dict[str, Any] = {"rank": 4, "iters": 2, "threads": 1}

# Slow enough to be caught in the middle: full SVDs of fourteen matrices of 256 x 256.
SLOW = ["--svd", "exact", "--iters", "14", "--bits", "4", "-t", "1"]
SLOW_SETTINGS: dict[str, Any] = {"svd": "exact", "iters": 14, "bits": 4, "threads": 1}


def journal_entries(output: Path) -> list[dict[str, object]]:
    """The whole lines of the journal of an unfinished conversion, but for the first."""
    try:
        text = (output.parent / f".{output.name}.loftq-partial/journal").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[1:-1]]


def finished(output: Path) -> set[str]:
    """The matrices that the journal holds."""
    entries = journal_entries(output)
    return {str(entry["tensor"]) for entry in entries if entry.get("record")}


def command(model: Path, output: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "loftq_cli", "convert", str(model), "-o", str(output), *options]


@dataclass(frozen=True)
class Run:
    """One process of a chain: how it ended, and the matrices that were finished by then."""

    code: int
    stdout: str
    stderr: str
    finished: set[str]


@dataclass(frozen=True)
class Chain:
    """A conversion that was stopped three times, in three ways, before it came to its end."""

    killed: Run
    interrupted: Run
    terminated: Run
    last: Run
    neighbour: pytest.ExceptionInfo[OutputConflictError]
    output: Path
    expected: Path


def stopped(arguments: Sequence[str], output: Path, after: int, number: signal.Signals) -> Run:
    """Start ``arguments``, wait until ``after`` matrices, at least one of them new, are finished,
    and send a signal."""
    after = max(after, len(finished(output)) + 1)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(finished(output)) < after and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number)
    stdout, stderr = process.communicate()
    return Run(process.returncode, stdout, stderr, finished(output))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Killed and interrupted in the first shard, terminated in the second, then left alone."""
    directory = tmp_path_factory.mktemp("chain")
    tensors = checkpoints.llama(256, 256, layers=2)
    model = checkpoints.write(directory / "model", tensors, cuts=(9,))
    output, expected = directory / "out", directory / "expected"
    arguments = command(model, output, *SLOW)
    killed = stopped(arguments, output, 2, signal.SIGKILL)
    interrupted = stopped(arguments, output, 4, signal.SIGINT)
    terminated = stopped(arguments, output, 8, signal.SIGTERM)
    process = subprocess.Popen(
        [*arguments, "-v"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    before = finished(output)
    while finished(output) == before and process.poll() is None:
        time.sleep(0.002)
    with pytest.raises(OutputConflictError) as neighbour:
        loftq_cli.convert(model, output=output, **SLOW_SETTINGS)
    stdout, stderr = process.communicate()
    last = Run(process.returncode, stdout, stderr, set(checkpoints.matrices(tensors)))
    loftq_cli.convert(model, output=expected, **SLOW_SETTINGS)
    return Chain(killed, interrupted, terminated, last, neighbour, output, expected)


def test_a_killed_conversion_has_kept_what_was_finished(chain: Chain) -> None:
    assert chain.killed.code == -signal.SIGKILL
    assert 2 <= len(chain.killed.finished) < 14


@pytest.mark.parametrize(
    ("which", "code", "name"),
    [("interrupted", 130, "SIGINT"), ("terminated", 143, "SIGTERM")],
)
def test_a_signal_ends_it_with_its_code_and_one_line(
    which: str, code: int, name: str, chain: Chain
) -> None:
    run: Run = getattr(chain, which)
    assert run.code == code
    assert run.stdout == ""
    resuming, line = run.stderr.splitlines()
    assert "resuming" in resuming
    assert line == (f"loftq: error: interrupted by {name} (run the same command again to resume)")


def test_every_run_goes_on_where_the_one_before_it_stopped(chain: Chain) -> None:
    runs = [chain.killed, chain.interrupted, chain.terminated, chain.last]
    for earlier, later in itertools.pairwise(runs):
        assert earlier.finished < later.finished


def test_the_last_run_resumes_in_the_second_shard_and_redoes_nothing(chain: Chain) -> None:
    said = {
        line.removeprefix("loftq: ").split(":")[0]: line
        for line in chain.last.stderr.splitlines()
        if ".weight: " in line
    }
    kept = {name for name, line in said.items() if "kept" in line}
    converted = {name for name, line in said.items() if "converted" in line}
    assert chain.last.code == 0
    assert "resuming the unfinished conversion" in chain.last.stderr
    assert chain.terminated.finished <= kept
    assert converted == chain.last.finished - chain.terminated.finished


def test_the_end_is_that_of_an_uninterrupted_conversion(chain: Chain) -> None:
    assert checkpoints.comparable(chain.output) == checkpoints.comparable(chain.expected)
    assert {path.name for path in chain.output.parent.iterdir()} == {"model", "out", "expected"}


def test_a_second_process_on_the_same_output_is_refused(chain: Chain) -> None:
    assert chain.neighbour.value.exit_code == 4
    assert "another process is converting" in chain.neighbour.value.message
    assert chain.last.code == 0


@pytest.mark.parametrize("over_an_old_output", [False, True])
def test_killed_at_any_call_that_changes_a_file_it_ends_with_the_same_bytes(
    over_an_old_output: bool, scratch: Path
) -> None:
    model = checkpoints.write(scratch / "model", checkpoints.llama(), cuts=(5,))
    (model / "tokenizer.json").write_text("{}")
    old, new = scratch / "old", scratch / "new"
    loftq_cli.convert(model, output=old, **{**QUICK_SETTINGS, "rank": 3})
    loftq_cli.convert(model, output=new, **QUICK_SETTINGS)
    expected = checkpoints.comparable(new)
    flags = ["--overwrite"] if over_an_old_output else []
    # Every eleventh call, until a conversion gets through.
    for call in itertools.count(1, 11):
        work = scratch / f"killed at {call}"
        work.mkdir()
        output = work / "out"
        if over_an_old_output:
            shutil.copytree(old, output)
        arguments: list[str | Path] = ["convert", model, "-o", output, *QUICK, *flags]
        ended = processes.loftq(arguments, scratch, processes.killed_at(call))
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL
        if output.exists():  # whatever is there is whole
            verify(open_output(output))
        loftq_cli.convert(model, output=output, overwrite=over_an_old_output, **QUICK_SETTINGS)
        assert checkpoints.comparable(output) == expected
        assert os.listdir(work) == ["out"]
    assert call > 100  # there were enough moments to be killed at


@pytest.fixture
def killed(tmp_path: Path) -> tuple[Path, Path]:
    """(model, output) of a conversion that was killed in the second of two shards."""
    model = checkpoints.write(tmp_path / "model", checkpoints.llama(), cuts=(5,))
    output = tmp_path / "out"
    arguments: list[str | Path] = ["convert", model, "-o", output, *QUICK]
    for call in itertools.count(60, 4):
        ended = processes.loftq(arguments, tmp_path, processes.killed_at(call))
        assert ended.code == -signal.SIGKILL
        if len(finished(output)) > 4:
            return model, output
        shutil.rmtree(tmp_path / ".out.loftq-partial")
    raise AssertionError


def test_a_source_that_changed_since_the_kill_is_refused(
    killed: tuple[Path, Path], tmp_path: Path
) -> None:
    model, output = killed
    checkpoints.write(model, checkpoints.llama(seed=1), cuts=(5,))
    ended = processes.loftq(["convert", model, "-o", output, *QUICK], tmp_path)
    assert ended.code == 3
    _, line = ended.stderr.splitlines()
    # Finished, and not read any more but for its mtime.
    assert "model-00001-of-00002.safetensors" in line
    assert "are not those that the unfinished conversion read: sha256 " in line
    assert not output.exists()


def test_another_setting_since_the_kill_is_refused_and_named(
    killed: tuple[Path, Path], tmp_path: Path
) -> None:
    model, output = killed
    ended = processes.loftq(["convert", model, "-o", output, *QUICK, "--seed", "7"], tmp_path)
    assert ended.code == 4
    (line,) = ended.stderr.splitlines()
    assert "seed 0 there, 7 now" in line
    assert not output.exists()


def test_a_file_that_cannot_grow_leaves_no_output_and_can_be_resumed(tmp_path: Path) -> None:
    model = checkpoints.write(tmp_path / "model", checkpoints.llama(), cuts=(5,))
    output = tmp_path / "out"
    arguments: list[str | Path] = ["convert", model, "-o", output, *QUICK]
    # Room for the journal's first entries and the adapter, not for the first shard.
    ended = processes.loftq(arguments, tmp_path, processes.limited_to(16_000))
    assert ended.code == 5
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert "File too large" in line
    assert ".safetensors" in line
    assert not output.exists()
    assert processes.loftq(arguments, tmp_path).code == 0
    verify(open_output(output))


def test_a_process_that_may_not_have_the_memory_is_told_before_it_writes(scratch: Path) -> None:
    weight = torch.zeros(4096, 2048)
    model = checkpoints.write(scratch / "model", {"model.layers.0.mlp.up_proj.weight": weight})
    arguments: list[str | Path] = [
        "convert",
        model,
        "-o",
        scratch / "new/out",
        *QUICK,
        "--layout",
        "loftq",
    ]
    ended = processes.loftq(arguments, scratch, processes.allowed(100 << 20))
    assert ended.code == 5, ended.stderr
    (line,) = ended.stderr.splitlines()
    # 17 bytes for each of 8.4 million weights, and 3 MB of thin factors.
    assert "tensor 'model.layers.0.mlp.up_proj.weight': 0.15 GB of memory needed, " in line
    assert "available (cpu)" in line
    assert not (scratch / "new").exists()
