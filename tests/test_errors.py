"""What messages are made of."""

from __future__ import annotations

import pytest

from loftq_cli.errors import listed


@pytest.mark.parametrize(
    ("names", "most", "text"),
    [
        (["a"], 1, "a"),
        (["a", "b"], 1, "a and 1 more"),
        (["a", "b", "c"], 3, "a, b, c"),
        (["a", "b", "c", "d", "e"], 3, "a, b, c and 2 more"),
    ],
)
def test_names_are_listed_up_to_a_number(names: list[str], most: int, text: str) -> None:
    assert listed(names, most) == text
