"""Damage to unfinished work: whatever was changed is noticed, and done again."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from loftq_cli.checkpoint.header import read_header
from loftq_cli.checkpoint.journal import Journal, Subject, subject_in
from tests.whole.crash.operations import Crash, DiesAt, watched
from tests.whole.crash.scenarios import Scenario, convert, tensors
from tests.whole.crash.stress import tell, times

JOURNAL = "journal"


def flip(path: Path, chance: random.Random) -> int:
    """Invert one bit; where."""
    content = bytearray(path.read_bytes())
    position = chance.randrange(len(content))
    content[position] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return position


def shorten(path: Path, chance: random.Random) -> int:
    """Cut the file off; where."""
    content = path.read_bytes()
    position = chance.randrange(len(content))
    path.write_bytes(content[:position])
    return position


def delete(path: Path, chance: random.Random) -> int:
    """Remove the file; where it was cut off."""
    path.unlink()
    return 0


def source_of(stored: str) -> str:
    """The tensor of the checkpoint that a tensor of the output belongs to."""
    module = stored.removeprefix("base_model.model.").split(".lora_")[0]
    return next(name for name in tensors() if module.startswith(name.removesuffix(".weight")))


@pytest.fixture
def unfinished(learned: dict[str, Scenario], scratch: Path) -> Path:
    """The directory of a conversion that died when all tensors were finished, with its last file
    yet to be written."""
    scenario = learned["convert"]
    for number in range(100, 0, -1):
        work = scratch / str(number)
        scenario.prepare(work)
        with pytest.raises(Crash), watched(work, DiesAt(number)):
            scenario.command(work)
        names = {path.name for path in work.rglob("*")}
        if "loftq_manifest.json" not in names and "out" not in names:
            return work
        shutil.rmtree(work)
    raise AssertionError


def test_damage_to_finished_work_is_noticed_and_done_again(
    unfinished: Path, learned: dict[str, Scenario], scratch: Path
) -> None:
    scenario = learned["convert"]
    assert convert(scenario, Path(shutil.copytree(unfinished, scratch / "intact"))).named("kept")
    counts: Counter[str] = Counter()
    for seed in range(times(200)):
        chance = random.Random(seed)
        work = Path(shutil.copytree(unfinished, scratch / f"seed {seed}"))
        partial = work / ".out.loftq-partial"
        shards = sorted((partial / "output").rglob("*.safetensors"))
        path = chance.choice([*shards, *shards, partial / JOURNAL])
        damage = chance.choice([flip, flip, shorten, delete])
        header = None if path.name == JOURNAL else {t.name: t for t in read_header(path).tensors}
        size = path.stat().st_size
        position = damage(path, chance)
        recorder = convert(scenario, work)
        redone = recorder.named("converted")
        if header is not None:
            stop = position + 1 if damage is flip else size
            hit = {
                source_of(tensor.name)
                for tensor in header.values()
                if tensor.start < stop and position < tensor.start + tensor.nbytes
            }
            assert redone == {name for name in hit if "layers" in name}, seed
        elif damage is delete:
            assert recorder.notes == []
            assert not recorder.named("kept")
        assert scenario.state(work) == scenario.expected, seed
        assert scenario.left(work) == [], seed
        counts[f"{damage.__name__} {'journal' if header is None else 'shard'}"] += 1
        shutil.rmtree(work)
    tell(", ".join(f"{name}: {count}" for name, count in sorted(counts.items())))


def lines_of(work: Path) -> list[bytes]:
    return (work / ".out.loftq-partial/journal").read_bytes().splitlines(keepends=True)


def write_lines(work: Path, lines: list[bytes]) -> None:
    (work / ".out.loftq-partial/journal").write_bytes(b"".join(lines))


def test_every_bit_of_the_journal_is_checked(unfinished: Path, scratch: Path) -> None:
    """A flipped bit in a line costs that line, and no other; in the first one all of them."""
    intact = lines_of(unfinished)
    identity = Subject("", {}, [])
    path = scratch / "journal"
    units = [line for line in intact[1:] if b'"tensor"' in line]
    for number, line in enumerate(intact):
        for position in range(0, len(line) - 1, 7):
            changed = bytearray(line)
            changed[position] ^= 1 << (position % 8)
            path.write_bytes(b"".join([*intact[:number], changed, *intact[number + 1 :]]))
            if number == 0:
                assert subject_in(path) is None
                continue
            with Journal(path, identity) as journal:
                assert len(journal.units) == len(units) - (line in units)
                assert len(journal.shards) == len(intact) - 1 - len(units) - (line not in units)


def test_a_damaged_line_costs_one_tensor_and_is_told(
    unfinished: Path, learned: dict[str, Scenario]
) -> None:
    lines = lines_of(unfinished)
    number = next(n for n, line in enumerate(lines) if b"q_proj" in line and b'"tensor"' in line)
    lines[number] = lines[number].replace(b'"bits": 4', b'"bits": 5')
    write_lines(unfinished, lines)
    recorder = convert(learned["convert"], unfinished)
    assert recorder.named("converted") == {"model.layers.0.self_attn.q_proj.weight"}
    assert any("1 line of the journal damaged" in text for text in recorder.details)
    assert learned["convert"].state(unfinished) == learned["convert"].expected


def test_a_journal_that_does_not_say_what_it_is_of_is_told_and_discarded(
    unfinished: Path, learned: dict[str, Scenario]
) -> None:
    lines = lines_of(unfinished)
    lines[0] = lines[0].replace(b'"rank": 2', b'"rank": 3')
    write_lines(unfinished, lines)
    recorder = convert(learned["convert"], unfinished)
    (note,) = recorder.notes
    assert "journal is damaged, or of another version: starting again" in note
    assert not recorder.named("kept")
    assert learned["convert"].state(unfinished) == learned["convert"].expected
