"""Unfinished work: resumed, refused, repaired."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest

from loftq_cli.checkpoint.header import read_header
from loftq_cli.errors import CorruptFileError, OutputConflictError, SourceChangedError
from loftq_cli.planning import make
from tests.support import checkpoints
from tests.support.bench import DOWN, FIRST_SHARD, KEY, OUT, QUERY, SECOND_SHARD, Bench, Recorder
from tests.support.makers import flip_bit


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


def test_a_source_that_was_only_touched_is_read_again_and_resumed(bench: Bench) -> None:
    expected = bench.directory / "expected"
    bench.convert(output=expected)
    bench.interrupt(DOWN)
    os.utime(bench.source / FIRST_SHARD, (1, 1))
    recorder = Recorder()
    bench.convert(recorder)
    assert recorder.named("read again") == {FIRST_SHARD}
    assert {KEY, OUT, QUERY} <= recorder.named("kept")
    assert checkpoints.comparable(bench.output) == checkpoints.comparable(expected)


def test_a_finished_shard_whose_contents_changed_is_refused_with_both_hashes(bench: Bench) -> None:
    bench.interrupt(DOWN)
    other_contents(bench)
    said = rf"{FIRST_SHARD}: .*: sha256 [0-9a-f]{{16}}… there, [0-9a-f]{{16}}… now"
    with pytest.raises(SourceChangedError, match=said):
        bench.convert()


def test_a_last_tensor_that_changed_is_refused_though_it_must_be_done_again(bench: Bench) -> None:
    """All before it are what they were, and its own bytes in the output are lost."""
    bench.interrupt(DOWN)
    shard = bench.source / FIRST_SHARD
    last = read_header(shard).tensors[-1]
    content = bytearray(shard.read_bytes())
    content[last.start] ^= 1
    shard.write_bytes(content)
    written = bench.partial / "output" / FIRST_SHARD
    names = [each for each in read_header(written).tensors if each.name.startswith(last.name)]
    flip_bit(written, names[0].start)
    with pytest.raises(SourceChangedError, match="the contents are not those"):
        bench.convert()
    content[last.start] ^= 1
    shard.write_bytes(content)
    bench.convert()  # restored, as the hint says


def test_nothing_of_a_changed_source_gets_among_what_was_finished(bench: Bench) -> None:
    """A tensor must be done again; the source changed in it; others behind it are finished."""
    expected = bench.directory / "expected"
    bench.convert(output=expected)
    bench.interrupt(QUERY)
    shard = bench.source / FIRST_SHARD
    place = next(each for each in read_header(shard).tensors if each.name == KEY)
    written = bench.partial / "output" / FIRST_SHARD
    names = [each for each in read_header(written).tensors if each.name.startswith(KEY)]
    flip_bit(written, names[0].start)
    flip_bit(shard, place.start)
    with pytest.raises(SourceChangedError, match="the contents up to tensor"):
        bench.convert()
    flip_bit(shard, place.start)
    recorder = Recorder()
    bench.convert(recorder)
    assert KEY in recorder.named("converted")
    assert checkpoints.comparable(bench.output) == checkpoints.comparable(expected)


class Meddler(Recorder):
    """Does something to the source when a tensor is worked on."""

    def __init__(self, name: str, meddle: Callable[[], None]) -> None:
        super().__init__()
        self.name, self.meddle = name, meddle

    def working_on(self, name: str) -> None:
        if name == self.name:
            self.meddle()


def test_a_source_that_is_written_to_while_it_is_read_is_refused(bench: Bench) -> None:
    shard = bench.source / FIRST_SHARD
    mtime = shard.stat().st_mtime_ns
    said = r"changed while it was read: mtime 20\d\d-.*Z then, 1970-01-01T00:00:01\.000000000Z now"
    with pytest.raises(SourceChangedError, match=said):
        bench.convert(Meddler(QUERY, lambda: os.utime(shard, (1, 1))))
    os.utime(shard, ns=(mtime, mtime))
    recorder = Recorder()
    bench.convert(recorder)
    assert {KEY, OUT} <= recorder.named("kept")


def test_a_source_that_is_shortened_while_it_is_read_costs_no_finished_work(bench: Bench) -> None:
    shard = bench.source / SECOND_SHARD
    content = shard.read_bytes()
    # Opened and checked before, when the first shard was: so it is short when its turn comes.
    with pytest.raises(CorruptFileError, match=rf"{SECOND_SHARD} ends at byte"):
        bench.convert(Meddler(QUERY, lambda: os.truncate(shard, len(content) - 1000)))
    shard.write_bytes(content)
    recorder = Recorder()
    bench.convert(recorder)
    assert {KEY, OUT, QUERY} <= recorder.named("kept")


@pytest.mark.parametrize("finished", [False, True])
def test_threads_that_nobody_chose_are_those_of_what_is_there(
    finished: bool, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bench.directory / "expected"
    bench.convert(output=expected, threads=3)
    if finished:
        bench.convert(threads=3)
    else:
        bench.interrupt(QUERY, threads=3)
    monkeypatch.setattr(make, "count_cpus", lambda: 2)
    outcome = bench.convert(threads=None)
    assert outcome.manifest["recipe"]["threads"] == 3
    assert outcome.nothing_to_do == finished
    assert checkpoints.comparable(bench.output) == checkpoints.comparable(expected)


def test_threads_that_somebody_chose_are_not_replaced(bench: Bench) -> None:
    bench.interrupt(QUERY, threads=3)
    with pytest.raises(OutputConflictError, match="threads 3 there, 2 now"):
        bench.convert(threads=2)
    with pytest.raises(OutputConflictError) as caught:
        bench.convert(threads=None, rank=3)
    assert "rank 4 there, 3 now" in caught.value.message


def test_overwriting_a_complete_output_takes_the_threads_of_the_machine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.convert(threads=3)
    monkeypatch.setattr(make, "count_cpus", lambda: 2)
    manifest = bench.convert(threads=None, overwrite=True).manifest
    assert manifest["recipe"]["threads"] == 2
