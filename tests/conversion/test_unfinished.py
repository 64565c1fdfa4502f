"""Unfinished work: resumed, refused, repaired."""

from __future__ import annotations

import json
import os

import pytest

from loftq_cli.errors import (
    OutputConflictError,
    SourceChangedError,
)
from tests import checkpoints
from tests.conversion.bench import DOWN, FIRST_SHARD, KEY, OUT, QUERY, SECOND_SHARD, Bench, Recorder
from tests.makers import flip_bit


def test_unfinished_work_is_resumed_and_ends_with_the_same_bytes(bench: Bench) -> None:
    expected = bench.directory / "expected"
    bench.convert(output=expected)
    bench.interrupt(QUERY)
    assert bench.names() == {"model", "expected", ".out.loftq-partial"}
    recorder = Recorder()
    bench.convert(recorder)
    assert recorder.notes == [f"resuming the unfinished conversion in {bench.partial}"]
    assert {KEY, OUT} <= recorder.named("kept")
    assert QUERY in recorder.named("converted")
    assert recorder.named("kept").isdisjoint(recorder.named("converted"))
    assert checkpoints.comparable(bench.output) == checkpoints.comparable(expected)


def test_unfinished_work_with_other_settings_is_refused_and_they_are_named(bench: Bench) -> None:
    bench.interrupt(QUERY)
    before = checkpoints.files(bench.partial)
    with pytest.raises(OutputConflictError) as caught:
        bench.convert(rank=3, exclude="*.k_proj.*")
    assert caught.value.exit_code == 4
    assert "rank 4 there, 3 now" in caught.value.message
    assert "exclude [] there, ['*.k_proj.*'] now" in caught.value.message
    assert "iters" not in caught.value.message
    assert checkpoints.files(bench.partial) == before


def test_unfinished_work_on_another_source_is_refused_and_the_file_named(bench: Bench) -> None:
    bench.interrupt(QUERY)
    bench.write(checkpoints.llama(intermediate=64), cuts=(5,))
    said = rf"source file {SECOND_SHARD} 105520 bytes, sha256 .* there, 56360 bytes, sha256 .* now"
    with pytest.raises(OutputConflictError, match=said):
        bench.convert()


def test_overwrite_discards_unfinished_work_with_other_settings(bench: Bench) -> None:
    expected = bench.directory / "expected"
    bench.convert(rank=3, output=expected)
    bench.interrupt(QUERY)
    bench.convert(rank=3, overwrite=True)
    assert checkpoints.comparable(bench.output) == checkpoints.comparable(expected)
    assert bench.names() == {"model", "expected", "out"}


def test_a_complete_output_leaves_unfinished_work_with_other_settings_alone(bench: Bench) -> None:
    bench.convert()
    bench.interrupt(QUERY, rank=3, overwrite=True)
    assert bench.convert().nothing_to_do
    recorder = Recorder()
    bench.convert(recorder, rank=3, overwrite=True)
    assert {KEY, OUT} <= recorder.named("kept")


@pytest.mark.parametrize(
    "tail",
    [
        b'{"tensor": "model.laye',
        b'{"tensor": "x", "prefix_sha256": "0"}',
        b"\0\0\0\0\0\0",
        b"17\n",
        b"null\n",
        b"\xff\xfe\n",
    ],
)
def test_a_torn_end_of_the_journal_is_cut_off(tail: bytes, bench: Bench) -> None:
    expected = bench.directory / "expected"
    bench.convert(output=expected)
    bench.interrupt(QUERY)
    journal = bench.partial / "journal"
    with journal.open("ab") as file:
        file.write(tail)
    recorder = Recorder()
    bench.convert(recorder)
    assert {KEY, OUT} <= recorder.named("kept")
    assert checkpoints.comparable(bench.output) == checkpoints.comparable(expected)


def test_a_journal_torn_in_its_last_record_redoes_that_tensor(bench: Bench) -> None:
    expected = bench.directory / "expected"
    bench.convert(output=expected)
    bench.interrupt(QUERY)
    journal = bench.partial / "journal"
    assert json.loads(journal.read_bytes().splitlines()[-1])["tensor"] == OUT
    os.truncate(journal, journal.stat().st_size - 10)
    recorder = Recorder()
    bench.convert(recorder)
    assert OUT in recorder.named("converted")
    assert KEY in recorder.named("kept")
    assert checkpoints.comparable(bench.output) == checkpoints.comparable(expected)


@pytest.mark.parametrize("length", [0, 1, 40])
def test_a_journal_without_a_whole_first_line_counts_as_no_work(length: int, bench: Bench) -> None:
    bench.interrupt(QUERY)
    os.truncate(bench.partial / "journal", length)
    recorder = Recorder()
    bench.convert(recorder, rank=3)
    assert recorder.notes == []
    assert bench.names() == {"model", "out"}


@pytest.mark.parametrize("file", [FIRST_SHARD, "loftq_init/adapter_model.safetensors"])
def test_a_finished_tensor_with_a_flipped_bit_is_redone(file: str, bench: Bench) -> None:
    expected = bench.directory / "expected"
    bench.convert(output=expected)
    bench.interrupt(DOWN)
    damaged = bench.partial / "output" / file
    written = damaged.read_bytes()
    # The last byte that was written belongs to some finished matrix.
    flip_bit(damaged, max(position for position, byte in enumerate(written) if byte))
    recorder = Recorder()
    bench.convert(recorder)
    in_first_shard = {name for name in checkpoints.matrices(checkpoints.llama()) if "attn" in name}
    assert len(recorder.named("converted") & in_first_shard) == 1
    assert checkpoints.comparable(bench.output) == checkpoints.comparable(expected)


def test_a_lost_shard_of_the_unfinished_output_is_redone(bench: Bench) -> None:
    expected = bench.directory / "expected"
    bench.convert(output=expected)
    bench.interrupt(DOWN)
    (bench.partial / "output" / FIRST_SHARD).unlink()
    bench.convert()
    assert checkpoints.comparable(bench.output) == checkpoints.comparable(expected)


def other_contents(bench: Bench) -> None:
    """The same headers, other bytes."""
    bench.write(checkpoints.llama(seed=1), cuts=(5,))


def test_a_source_that_changed_is_refused_and_the_work_kept(bench: Bench) -> None:
    bench.interrupt(QUERY)
    before = checkpoints.files(bench.partial)
    other_contents(bench)
    with pytest.raises(SourceChangedError) as caught:
        bench.convert()
    assert caught.value.exit_code == 3
    assert FIRST_SHARD in caught.value.message
    assert "--overwrite" in caught.value.hint
    assert checkpoints.files(bench.partial) == before
    bench.write(checkpoints.llama(), cuts=(5,))  # restored, as the hint says
    recorder = Recorder()
    bench.convert(recorder)
    assert {KEY, OUT} <= recorder.named("kept")


def test_overwrite_starts_again_where_the_source_changed(bench: Bench) -> None:
    bench.interrupt(QUERY)
    other_contents(bench)
    recorder = Recorder()
    bench.convert(recorder, overwrite=True)
    assert "starting again" in recorder.notes[-1]
    expected = bench.directory / "expected"
    bench.convert(output=expected)
    assert checkpoints.comparable(bench.output) == checkpoints.comparable(expected)


@pytest.mark.parametrize("stray", [".loftq_manifest.json.tmp", ".config.json.tmp", "vocab.txt"])
def test_files_that_a_crash_left_in_the_unfinished_output_are_not_published(
    stray: str, bench: Bench
) -> None:
    bench.interrupt(QUERY)
    (bench.partial / "output" / stray).write_bytes(b"half")
    bench.convert()
    assert stray not in checkpoints.files(bench.output)
    assert bench.convert().nothing_to_do  # verified
