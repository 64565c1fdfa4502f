"""Maps from patterns to numbers: how they are written, what matches, what is a mistake."""

from __future__ import annotations

from typing import Any

import pytest

from loftq_cli.errors import PatternError, UsageError
from loftq_cli.settings import maps

NAMES = ["a.q.weight", "a.k.weight", "b.q.weight", "b.k[1].weight"]


@pytest.mark.parametrize(
    ("given", "entries"),
    [
        (None, ()),
        ("*=2", ("*=2",)),
        ("*=2, a.*=4", ("*=2", "a.*=4")),
        (["*=2", "a,b*=4"], ("*=2", "a,b*=4")),
        ({"*": 2, "a.*": 4}, ("*=2", "a.*=4")),
        ((), ()),
    ],
)
def test_the_forms_of_a_map(given: Any, entries: tuple[str, ...]) -> None:
    assert maps.canonical("--bits-map", given) == entries
    assert maps.canonical("--bits-map", list(entries)) == entries


@pytest.mark.parametrize("given", [4, [4], [None], {"*": 2}.items(), True])
def test_what_is_no_map(given: Any) -> None:
    with pytest.raises(UsageError, match=r"--bits-map .*must be PATTERN=NUMBER"):
        maps.canonical("--bits-map", given)


@pytest.mark.parametrize(
    "entry", ["", "*", "*=", "=4", "*=four", "*=-4", "*=4.0", "*=4 bits", "*=1234567890"]
)
def test_what_is_no_entry(entry: str) -> None:
    with pytest.raises(UsageError, match="must be PATTERN=NUMBER") as caught:
        maps.parse("--bits-map", [entry])
    assert caught.value.exit_code == 2


def test_a_pattern_may_hold_an_equals_sign() -> None:
    assert maps.parse("--bits-map", ["a=b=4"]) == {"a=b": 4}


@pytest.mark.parametrize("entries", [["*=2", "*=4"], ["*=2", "* =2"]])
def test_a_pattern_that_is_there_twice(entries: list[str]) -> None:
    with pytest.raises(UsageError, match=r"--bits-map: the pattern '\*' is there twice"):
        maps.parse("--bits-map", entries)


def test_later_entries_win() -> None:
    found = maps.apply("--bits-map", ["*=2", "*.q.*=4", "b.*=3"], NAMES)
    assert found == {"a.q.weight": 4, "a.k.weight": 2, "b.q.weight": 3, "b.k[1].weight": 3}


def test_what_no_pattern_matches_is_left_out() -> None:
    assert maps.apply("--bits-map", ["a.*=8"], NAMES) == {"a.q.weight": 8, "a.k.weight": 8}
    assert maps.apply("--bits-map", [], NAMES) == {}


def test_an_entry_that_later_ones_overrule_everywhere_is_a_mistake() -> None:
    with pytest.raises(UsageError, match=r"'a\.q\.weight' decides nothing") as caught:
        maps.apply("--bits-map", ["a.q.weight=4", "*=2"], NAMES)
    assert "later entries win" in caught.value.hint
    with pytest.raises(UsageError, match=r"'\*' decides nothing"):
        maps.apply("--bits-map", ["*=4", "a.*=2", "b.*=2"], NAMES)


def test_a_pattern_that_matches_nothing_shows_near_names() -> None:
    with pytest.raises(PatternError, match=r"--rank-map 'a\.v\.\*' matches no matrix .*a\.q"):
        maps.apply("--rank-map", ["a.v.*=4"], NAMES)
    with pytest.raises(PatternError):  # case counts
        maps.apply("--rank-map", ["A.*=4"], NAMES)
