"""``loftq convert --part``: what it prints, and what the command without it says."""

from __future__ import annotations

import json

import pytest

from tests.support.commands import QUICK, Command


def test_a_part_says_what_it_did_and_the_last_step_what_is_missing(loftq: Command) -> None:
    first = loftq("convert", "./model", "-o", "shared", "--part", "1/2", *QUICK)
    assert first.exit_code == 0, first.stderr
    assert "part 1 of 2, " in first.stdout
    assert "matrices, is finished" in first.stdout
    assert "next: the other parts, then the same command without --part" in first.stdout
    again = loftq("convert", "./model", "-o", "shared", "--part", "1/2", "--json", *QUICK)
    told = json.loads(again.stdout)
    assert (told["part"], told["parts"], told["nothing_to_do"]) == (1, 2, True)
    assert {*told} == {
        *("part", "parts", "matrices", "nothing_to_do", "published", "fingerprint"),
    }
    last = loftq("convert", "./model", "-o", "shared", *QUICK)
    assert last.exit_code == 4
    assert "part 2 of 2 is not finished (run `--part 2/2`, then this command again)" in last.stderr
    assert loftq("convert", "./model", "-o", "shared", "--part", "2/2", *QUICK).exit_code == 0
    assert "wrote shared" in loftq("convert", "./model", "-o", "shared", *QUICK).stdout
    done = loftq("convert", "./model", "-o", "shared", "--part", "2/2", *QUICK)
    assert "part 2 of 2: nothing to do, shared is complete" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--part", "3/2"], "--part 3/2: not a part"),
        (["--part", "1/2", "--discard-shards"], "--discard-shards and --part exclude each other"),
        (["--part", "1/2", "--calibrate-text", "a"], "--calibrate-text and --part exclude"),
    ],
)
def test_what_is_no_part_or_cannot_be_one_is_refused(
    words: list[str], said: str, loftq: Command
) -> None:
    result = loftq("convert", "./model", "-o", "shared", *words, *QUICK)
    assert result.exit_code == 2
    assert said in result.stderr
