"""docs/decisions.md: newest first, and what was superseded says by what."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[3] / "docs" / "decisions.md").read_text("utf-8")
ENTRIES = re.findall(r"^## (.*)\n((?:(?!^## ).*\n?)*)", PAGE, flags=re.MULTILINE)


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_newest_entry_comes_first() -> None:
    dates = [heading.split(" · ")[0] for heading, _ in ENTRIES]
    assert len(dates) > 40
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in dates)
    assert dates == sorted(dates, reverse=True)


def test_what_was_superseded_leads_to_later_entries() -> None:
    later: list[str] = []
    marked = 0
    for heading, text in ENTRIES:
        for mark in re.findall(r"^\*\*Superseded\*\*.*", text, flags=re.MULTILINE):
            links = re.findall(r"\]\(#([^)]+)\)", mark)
            assert links, heading
            assert set(links) <= set(later), heading
            marked += 1
        later.append(slug(heading))
    assert marked >= 8
