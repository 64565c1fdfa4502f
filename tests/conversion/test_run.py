"""Disks, permissions, memory: what the conversion cannot help."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from typing import Any

import pytest
import torch

import loftq_cli
from loftq_cli.checkpoint.reader import ShardReader
from loftq_cli.conversion import room
from loftq_cli.errors import EnvironmentFailure, InputError
from loftq_cli.kernels import native
from loftq_cli.layouts import adapter
from loftq_cli.machine.observer import Observer
from loftq_cli.merging.merge import merge
from loftq_cli.planning import decomposer
from loftq_cli.settings.file import save
from tests.support import checkpoints
from tests.support.bench import KEY, OUT, SECOND_SHARD, Bench, Recorder


def test_a_parent_that_cannot_hold_a_directory_is_a_failure_of_the_environment(
    bench: Bench,
) -> None:
    (bench.directory / "file").write_bytes(b"")
    with pytest.raises(EnvironmentFailure) as caught:
        bench.convert(output=bench.directory / "file" / "out")
    assert caught.value.exit_code == 5
    assert bench.names() == {"model", "file"}


def test_a_directory_that_denies_writing(bench: Bench) -> None:
    parent = bench.directory / "locked"
    parent.mkdir()
    parent.chmod(0o555)
    if os.access(parent, os.W_OK):
        pytest.skip("the superuser may write anywhere")
    with pytest.raises(EnvironmentFailure, match="locked"):
        bench.convert(output=parent / "out")


def test_too_little_space_is_found_out_before_anything_is_computed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 9, 9))
    recorder = Recorder()
    with pytest.raises(EnvironmentFailure, match=r"MB needed, 0\.00 MB free") as caught:
        bench.convert(recorder)
    assert caught.value.exit_code == 5
    assert not recorder.named("converted")
    assert bench.names() == {"model"}


def test_space_that_unfinished_work_will_still_need_is_counted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A shard has its full size from the start; only what is written takes space.
    tensors = checkpoints.llama(hidden=512, intermediate=512)
    bench.write(tensors, cuts=(5,))
    bench.interrupt(KEY, layout="dense")  # before the first matrix
    asked = []
    monkeypatch.setattr(room, "check_disks", lambda source, path, needed: asked.append(needed))
    bench.interrupt(KEY, layout="dense")
    left = sum(tensors[name].nbytes for name in checkpoints.matrices(tensors))
    assert asked[0] - room._MARGIN >= left


def test_a_disk_that_fills_up_leaves_no_output_and_resumes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bench.directory / "expected"
    bench.convert(output=expected)
    real, calls = os.pwrite, []

    def pwrite(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    with monkeypatch.context() as patches:
        patches.setattr(os, "pwrite", pwrite)
        with pytest.raises(EnvironmentFailure, match="No space left on device") as caught:
            bench.convert()
    assert caught.value.exit_code == 5
    assert ".safetensors" in caught.value.message
    assert not bench.output.exists()
    recorder = Recorder()
    bench.convert(recorder)
    assert recorder.named("kept")
    assert checkpoints.comparable(bench.output) == checkpoints.comparable(expected)


def torch_allocation() -> None:
    torch.empty(1 << 50)


def python_allocation() -> None:
    bytearray(1 << 50)


@pytest.mark.parametrize("allocate", [torch_allocation, python_allocation])
def test_running_out_of_memory_names_the_tensor(
    allocate: Any, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decompose(*arguments: Any) -> None:
        allocate()

    monkeypatch.setattr(decomposer, "decompose", decompose)
    with pytest.raises(EnvironmentFailure, match=r"q_proj.*out of memory|k_proj.*out of memory"):
        bench.convert()
    assert not bench.output.exists()


@pytest.mark.parametrize("where", ["reading", "writing"])
def test_running_out_of_memory_beside_the_computation_names_the_tensor(
    where: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*arguments: Any) -> None:
        bytearray(1 << 50)

    if where == "writing":
        monkeypatch.setattr(adapter, "tensors", allocate)
    else:
        monkeypatch.setattr(ShardReader, "read", allocate)
    with pytest.raises(EnvironmentFailure, match=r"tensor 'model.*k_proj.*': out of memory"):
        bench.convert()


def test_other_errors_of_torch_stay_bugs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def decompose(*arguments: Any) -> None:
        torch.ones(2) @ torch.ones(3)

    monkeypatch.setattr(decomposer, "decompose", decompose)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        bench.convert()


def test_a_source_shard_that_vanishes_is_named_and_the_work_kept(bench: Bench) -> None:
    second = bench.source / SECOND_SHARD
    hidden = bench.directory / "hidden"

    class Thief(Recorder):
        def working_on(self, name: str) -> None:
            if second.exists():
                second.rename(hidden)

    with pytest.raises((EnvironmentFailure, InputError), match=second.name):
        bench.convert(Thief())
    hidden.rename(second)
    recorder = Recorder()
    bench.convert(recorder)
    assert {KEY, OUT} <= recorder.named("kept")


@pytest.mark.parametrize(
    ("umask", "directories", "files"),
    [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600), (0o002, 0o775, 0o664), (0o027, 0o750, 0o640)],
)
def test_modes_follow_the_umask(umask: int, directories: int, files: int, bench: Bench) -> None:
    (bench.source / "tokenizer.json").write_text("{}")
    before = os.umask(umask)
    try:
        recipe = bench.convert(output=bench.directory / "new/out").manifest["recipe"]
        merge(bench.directory / "new/out", bench.directory / "new/merged", observer=Observer())
        save(bench.directory / "new/recipe.toml", recipe)
        moments = loftq_cli.Moments(2)
        moments.add(torch.ones(1, 2))
        path = bench.directory / "new/deep/stats.safetensors"
        loftq_cli.save_statistics(path, {"a.weight": moments})
    finally:
        os.umask(before)
    made = [bench.directory / "new", *(bench.directory / "new").rglob("*")]
    modes = {(path.is_dir(), path.stat().st_mode & 0o777) for path in made}
    assert modes == {(True, directories), (False, files)}


def test_a_method_that_needs_the_kernels_says_so_where_there_are_none(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "load", lambda: native.Kernels(None, "no C compiler found"))
    recorder = Recorder()
    bench.convert(recorder, method="trellis", iters=1)
    expected = "trellis takes a hundred times as long without compiled kernels: no C compiler found"
    assert sum(expected in note for note in recorder.notes) == 1
