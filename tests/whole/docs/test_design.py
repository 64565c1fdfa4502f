"""The page on the design shows the house as it is."""

from __future__ import annotations

from tests.support.tree import PAGE, rewritten


def test_the_tree_shows_every_file_with_its_sentence() -> None:
    """``python -m tests.support.tree`` writes it anew."""
    page = PAGE.read_text("utf-8")
    assert page == rewritten(page)
    assert page.count(".py ") > 150
