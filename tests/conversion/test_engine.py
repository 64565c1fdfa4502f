"""What becomes of an output that is there already, ours or not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from loftq_cli.errors import OutputConflictError, UsageError, VerificationError
from tests.support import checkpoints
from tests.support.bench import FIRST_SHARD, MANIFEST, Bench, Recorder, times
from tests.support.makers import flip_bit

# A complete output


def test_a_complete_output_is_verified_and_left_alone(bench: Bench) -> None:
    first = bench.convert()
    before = times(bench.output)
    again = bench.convert()
    assert (first.nothing_to_do, again.nothing_to_do) == (False, True)
    assert again.manifest == first.manifest
    assert times(bench.output) == before
    assert bench.names() == {"model", "out"}


def test_a_complete_output_is_recognised_when_the_source_moves(bench: Bench) -> None:
    bench.convert()
    bench.source = bench.source.rename(bench.directory / "elsewhere")
    assert bench.convert().nothing_to_do


@pytest.mark.parametrize(
    "alter",
    [
        lambda output: flip_bit(output / FIRST_SHARD, -1),
        lambda output: flip_bit(output / "config.json", 0),
        lambda output: os.truncate(output / FIRST_SHARD, 100),
        lambda output: (output / "loftq_init/adapter_model.safetensors").unlink(),
    ],
    ids=["one bit", "config", "truncated", "missing"],
)
def test_a_complete_output_that_was_altered_fails_verification(alter: Any, bench: Bench) -> None:
    bench.convert()
    alter(bench.output)
    before = checkpoints.files(bench.output)
    with pytest.raises(VerificationError) as caught:
        bench.convert()
    assert caught.value.exit_code == 3
    assert str(bench.output) in caught.value.message
    assert "--overwrite" in caught.value.hint
    assert checkpoints.files(bench.output) == before
    assert bench.names() == {"model", "out"}


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (b"{", "not valid JSON"),
        (b'{"format_version": 1}', "damaged"),
        (b'{"format_version": 99}', "format version 99"),
    ],
)
def test_an_output_with_a_manifest_that_cannot_be_read_is_refused(
    manifest: bytes, message: str, bench: Bench
) -> None:
    bench.output.mkdir()
    (bench.output / MANIFEST).write_bytes(manifest)
    with pytest.raises(OutputConflictError, match=message):
        bench.convert()
    assert checkpoints.files(bench.output) == {MANIFEST: manifest}
    assert bench.convert(overwrite=True).manifest["format_version"] == 1


# What is in the way


def make_file(path: Path) -> None:
    path.write_bytes(b"mine")


def make_directory(path: Path) -> None:
    (path / "thesis").mkdir(parents=True)
    (path / "thesis/chapter.tex").write_bytes(b"mine")


def make_hidden(path: Path) -> None:
    path.mkdir()
    (path / ".git").write_bytes(b"mine")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("make", [make_file, make_directory, make_hidden])
def test_what_is_not_ours_is_never_replaced(make: Any, overwrite: bool, bench: Bench) -> None:
    make(bench.output)
    before = checkpoints.files(bench.directory)
    with pytest.raises(OutputConflictError) as caught:
        bench.convert(overwrite=overwrite)
    assert caught.value.exit_code == 4
    assert str(bench.output) in caught.value.message
    assert checkpoints.files(bench.directory) == before
    assert bench.names() == {"model", "out"}


def test_what_comes_into_being_during_the_conversion_is_not_replaced(bench: Bench) -> None:
    class Intruder(Recorder):
        def working_on(self, name: str) -> None:
            bench.output.mkdir(exist_ok=True)
            (bench.output / "notes.txt").write_bytes(b"mine")

    with pytest.raises(OutputConflictError):
        bench.convert(Intruder())
    assert checkpoints.files(bench.output) == {"notes.txt": b"mine"}
    shutil.rmtree(bench.output)
    recorder = Recorder()
    bench.convert(recorder)
    assert not recorder.named("converted")  # the finished work was kept


def test_an_empty_directory_is_as_good_as_none(bench: Bench) -> None:
    bench.output.mkdir()
    bench.convert()
    assert (bench.output / MANIFEST).is_file()


def test_missing_parents_are_made(bench: Bench) -> None:
    deep = bench.directory / "a/b/out"
    bench.convert(output=deep)
    assert (deep / MANIFEST).is_file()
    assert [path.name for path in deep.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("exists", [True, False], ids=["to an empty directory", "dangling"])
def test_a_link_is_followed_and_stays_a_link(exists: bool, bench: Bench) -> None:
    disk = bench.directory / "disk"
    target = disk / "place"
    (target if exists else disk).mkdir(parents=True)
    bench.output.symlink_to(target)
    bench.convert()
    assert bench.output.is_symlink()
    assert (target / MANIFEST).is_file()
    assert bench.convert().nothing_to_do


def test_a_loop_of_links_is_a_usage_error(bench: Bench) -> None:
    bench.output.symlink_to(bench.output)
    with pytest.raises((UsageError, OutputConflictError)):
        bench.convert()


def test_a_mount_point_is_refused_before_anything_is_computed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.output.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == bench.output)
    recorder = Recorder()
    with pytest.raises(OutputConflictError, match="mount point"):
        bench.convert(recorder)
    assert not recorder.named("converted")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("model", "inside the input"),
        ("model/out", "inside the input"),
        ("model/a/../b", "inside the input"),
        ("link/out", "inside the input"),
        (".", "contains the input"),
    ],
)
def test_the_output_may_not_be_inside_the_input_or_around_it(
    output: str, message: str, bench: Bench
) -> None:
    (bench.directory / "link").symlink_to(bench.source)
    before = checkpoints.files(bench.directory)
    with pytest.raises(UsageError, match=message) as caught:
        bench.convert(output=bench.directory / output, overwrite=True)
    assert caught.value.exit_code == 2
    assert checkpoints.files(bench.directory) == before
