"""``--part``: shares that need not know of each other come to what one process makes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loftq_cli.checkpoint.request import Request
from loftq_cli.conversion.parts import Part, parsed
from loftq_cli.conversion.prepare import prepare
from loftq_cli.conversion.run_part import run_part
from loftq_cli.errors import OutputConflictError, SourceChangedError, UsageError
from loftq_cli.settings.options import Options
from tests.support import checkpoints
from tests.support.bench import Bench, Recorder

CUTS = (6, 13)


@pytest.fixture
def shared(tmp_path: Path) -> Bench:
    """A source of fourteen matrices in three shards."""
    made = Bench(tmp_path)
    made.write(checkpoints.llama(layers=2), cuts=CUTS)
    return made


def run(
    bench: Bench,
    part: str,
    recorder: Recorder | None = None,
    *,
    overwrite: bool = False,
    **settings: object,
) -> dict[str, object]:
    recorder = recorder or Recorder()
    options = Options(**{"threads": 1, "rank": 4, "iters": 2, **settings})
    request = Request(str(bench.source))
    plan, path = prepare(request, bench.output, options, overwrite=overwrite, observer=recorder)
    return run_part(plan, path, parsed(part), overwrite=overwrite, observer=recorder)


def expected(bench: Bench) -> dict[str, object]:
    other = bench.directory / "expected"
    bench.convert(output=other)
    return checkpoints.comparable(other)


def test_parts_in_any_order_and_the_command_without_them_are_one_conversion(shared: Bench) -> None:
    for part in ("3/3", "1/3", "2/3"):
        run(shared, part)
    recorder = Recorder()
    shared.convert(recorder)
    assert recorder.named("converted") == set()
    assert len(recorder.named("kept")) == len(checkpoints.llama(layers=2))
    assert checkpoints.comparable(shared.output) == expected(shared)
    assert shared.names() == {"model", "out", "expected"}
    assert run(shared, "2/3")["published"]
    assert shared.names() == {"model", "out", "expected"}


def test_the_last_step_says_which_parts_are_missing(shared: Bench) -> None:
    run(shared, "2/4")
    with pytest.raises(OutputConflictError, match=r"out: parts 1, 3, 4 of 4 are not finished"):
        shared.convert()
    run(shared, "1/4")
    run(shared, "4/4")
    with pytest.raises(OutputConflictError) as caught:
        shared.convert()
    assert "part 3 of 4 is not finished" in caught.value.message
    assert caught.value.hint == "run `--part 3/4`, then this command again"
    assert not shared.output.exists()


def test_more_parts_than_there_is_work_leave_nothing_missing(shared: Bench) -> None:
    count = len(checkpoints.matrices(checkpoints.llama(layers=2))) + len(CUTS) + 1
    for number in range(1, count + 1):
        run(shared, f"{number}/{count + 5}")
    assert run(shared, f"{count + 5}/{count + 5}")["matrices"] == 0
    shared.convert()
    assert checkpoints.comparable(shared.output) == expected(shared)


def test_a_part_that_was_interrupted_goes_on_where_it_was(shared: Bench) -> None:
    first = Recorder()
    run(shared, "1/2", first)
    work = first.named("converted")
    assert len(work) == 7
    run(shared, "2/2", second := Recorder())
    stopped = Bench(shared.directory / "again")
    stopped.write(checkpoints.llama(layers=2), cuts=CUTS)
    last = [text.split(":")[0] for text in second.details if "converted" in text][-1]
    with pytest.raises(KeyboardInterrupt):
        run(stopped, "2/2", Recorder(stop_before=last))
    run(stopped, "2/2", resumed := Recorder())
    assert resumed.named("converted") < second.named("converted")
    assert last in resumed.named("converted")
    assert run(stopped, "2/2", nothing := Recorder())["nothing_to_do"]
    assert nothing.details == []
    run(stopped, "1/2")
    stopped.convert()
    assert checkpoints.comparable(stopped.output) == expected(shared)


def test_what_was_damaged_since_is_done_again_by_the_last_step(shared: Bench) -> None:
    for part in ("1/2", "2/2"):
        run(shared, part)
    path = shared.partial / "output/model-00002-of-00003.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    shared.convert(recorder := Recorder())
    assert len(recorder.named("converted")) == 1
    assert checkpoints.comparable(shared.output) == expected(shared)


def test_a_source_that_changed_between_two_parts_is_refused(shared: Bench) -> None:
    run(shared, "1/2")
    checkpoints.write(shared.source, checkpoints.llama(layers=2, seed=1), cuts=CUTS)
    run(shared, "2/2")
    with pytest.raises(SourceChangedError, match="are not those that"):
        shared.convert()
    assert not shared.output.exists()


def test_a_source_that_was_only_touched_is_read_again_and_taken(shared: Bench) -> None:
    run(shared, "1/2")
    for path in shared.source.iterdir():
        os.utime(path)
    run(shared, "2/2")
    shared.convert(recorder := Recorder())
    assert recorder.named("read again")
    assert recorder.named("converted") == set()
    assert checkpoints.comparable(shared.output) == expected(shared)


def test_parts_of_another_number_or_with_other_settings_are_refused(shared: Bench) -> None:
    run(shared, "1/2")
    with pytest.raises(OutputConflictError, match="holds parts of 2, and this is part 1 of 3"):
        run(shared, "1/3")
    with pytest.raises(OutputConflictError, match=r"seed 0 there, 7 now"):
        run(shared, "2/2", seed=7)
    with pytest.raises(OutputConflictError, match=r"seed 0 there, 7 now"):
        run(shared, "2/2", seed=7, overwrite=True)  # another part may be at it


def test_an_output_that_is_there_stays_until_the_last_step(shared: Bench) -> None:
    shared.convert(seed=3)
    old = checkpoints.comparable(shared.output)
    with pytest.raises(OutputConflictError, match="seed 3 there, 0 now"):
        run(shared, "1/2")
    for part in ("1/2", "2/2"):
        run(shared, part, overwrite=True)
        assert checkpoints.comparable(shared.output) == old
    shared.convert(overwrite=True)
    assert checkpoints.comparable(shared.output) == expected(shared)


def test_parts_may_be_at_work_at_the_same_time_but_not_beside_the_last_step(shared: Bench) -> None:
    class Meanwhile(Recorder):
        done = False

        def working_on(self, name: str) -> None:
            if not self.done:
                self.done = True
                run(shared, "2/2")
                with pytest.raises(OutputConflictError, match="another process is converting"):
                    shared.convert()

    run(shared, "1/2", Meanwhile())
    shared.convert()
    assert checkpoints.comparable(shared.output) == expected(shared)


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "a/b", "1/10001"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--part .*: not a part"):
        parsed(text)


def test_a_part_is_typed_as_it_is_counted() -> None:
    assert parsed("3/8") == Part(3, 8)
