"""Outputs with other settings, and replacing them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from loftq_cli.conversion import workspace
from loftq_cli.errors import NonFiniteWeightError, OutputConflictError
from tests.support import checkpoints
from tests.support.bench import FIRST_SHARD, KEY, MANIFEST, OUT, QUERY, Bench, Recorder, times
from tests.support.makers import flip_bit


def test_an_output_with_other_settings_is_refused_and_they_are_named(bench: Bench) -> None:
    bench.convert()
    before = times(bench.output)
    with pytest.raises(OutputConflictError) as caught:
        bench.convert(rank=3, scale="absmax")
    assert "rank 4 there, 3 now" in caught.value.message
    assert "scale 'mse' there, 'absmax' now" in caught.value.message
    assert "--overwrite" in caught.value.hint
    assert times(bench.output) == before
    assert bench.names() == {"model", "out"}


def test_an_output_of_another_source_is_refused(bench: Bench) -> None:
    bench.convert()
    bench.write(checkpoints.llama(intermediate=64), cuts=(5,))
    with pytest.raises(OutputConflictError, match="another source"):
        bench.convert()


def test_overwrite_replaces_an_output_of_ours(bench: Bench) -> None:
    bench.convert()
    (bench.output / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    bench.convert(rank=3, overwrite=True)
    fresh = bench.directory / "fresh"
    bench.convert(rank=3, output=fresh)
    assert checkpoints.comparable(bench.output) == checkpoints.comparable(fresh)
    assert bench.names() == {"model", "out", "fresh"}


def test_overwrite_repairs_an_altered_output(bench: Bench) -> None:
    bench.convert()
    before = checkpoints.comparable(bench.output)
    flip_bit(bench.output / FIRST_SHARD, -1)
    bench.convert(overwrite=True)
    assert checkpoints.comparable(bench.output) == before


def test_the_old_output_stays_until_the_new_one_is_complete(bench: Bench) -> None:
    bench.convert()
    before = checkpoints.files(bench.output)
    seen = []

    class Watcher(Recorder):
        def working_on(self, name: str) -> None:
            seen.append(checkpoints.files(bench.output) == before)

    bench.convert(Watcher(), rank=3, overwrite=True)
    assert all(seen)
    assert len(seen) == len(checkpoints.llama())
    assert checkpoints.files(bench.output) != before


def test_the_old_output_stays_where_the_new_conversion_fails(bench: Bench) -> None:
    bench.convert()
    before = checkpoints.files(bench.output)
    tensors = checkpoints.llama(intermediate=64)
    tensors[QUERY][0, 0] = math.nan
    bench.write(tensors, cuts=(5,))
    with pytest.raises(NonFiniteWeightError):
        bench.convert(overwrite=True)
    assert checkpoints.files(bench.output) == before
    assert bench.names() == {"model", "out"}


def test_an_interrupted_overwrite_keeps_the_old_output_and_resumes(bench: Bench) -> None:
    bench.convert()
    before = checkpoints.files(bench.output)
    bench.interrupt(QUERY, rank=3, overwrite=True)
    assert checkpoints.files(bench.output) == before
    recorder = Recorder()
    bench.convert(recorder, rank=3, overwrite=True)
    assert "resuming" in recorder.notes[0]
    assert recorder.named("converted").isdisjoint({KEY, OUT})
    assert json.loads((bench.output / MANIFEST).read_bytes())["recipe"]["rank"] == 3


@pytest.mark.parametrize("crash_at", ["first rename", "second rename", "removal"])
def test_a_crash_while_the_output_is_replaced_loses_neither(
    crash_at: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.convert()
    old = checkpoints.comparable(bench.output)
    expected = bench.directory / "expected"
    bench.convert(rank=3, output=expected)
    new = checkpoints.comparable(expected)
    calls = []

    def crash(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    def rename(source: Path, target: Path) -> None:
        calls.append(target)
        if crash_at == ("first rename", "second rename")[min(len(calls), 2) - 1]:
            crash()
        os.replace(source, target)

    with monkeypatch.context() as patches:
        patches.setattr(os, "rename", rename)
        if crash_at == "removal":
            patches.setattr(workspace.ConversionWorkspace, "discard", crash)
        with pytest.raises(KeyboardInterrupt):
            bench.convert(rank=3, overwrite=True)

    if crash_at == "first rename":
        assert checkpoints.comparable(bench.output) == old
    elif crash_at == "second rename":
        assert checkpoints.comparable(bench.partial / "replaced") == old
    else:
        assert checkpoints.comparable(bench.output) == new
    recorder = Recorder()
    bench.convert(recorder, rank=3, overwrite=crash_at == "first rename")
    assert not recorder.named("converted")
    assert checkpoints.comparable(bench.output) == new
    assert bench.names() == {"model", "out", "expected"}


def test_an_old_output_that_a_crash_left_behind_is_in_nobodys_way(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.convert()

    def crash(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(workspace.ConversionWorkspace, "discard", crash)
        with pytest.raises(KeyboardInterrupt):
            bench.convert(rank=3, overwrite=True)
    assert (bench.partial / "replaced" / MANIFEST).is_file()
    bench.convert(rank=2, overwrite=True)
    assert json.loads((bench.output / MANIFEST).read_bytes())["recipe"]["rank"] == 2
    assert bench.names() == {"model", "out"}
