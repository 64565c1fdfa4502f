"""docs/glossary.md: terms are unique and sorted, and what the project has a name for is there."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "glossary.md").read_text("utf-8")
ENTRIES = re.findall(r"^### (.*)\n\n((?:(?!^#).*\n?)*)", PAGE, flags=re.MULTILINE)
TERMS = [term for term, _ in ENTRIES]


def test_terms_are_unique_and_sorted() -> None:
    assert len(TERMS) > 40
    assert sorted(set(TERMS), key=str.casefold) == TERMS


def test_every_term_is_explained() -> None:
    assert len(ENTRIES) == PAGE.count("\n### ")
    for term, text in ENTRIES:
        assert text.strip().endswith("."), term


def test_the_words_of_the_format_are_there() -> None:
    words = "absmax adapter backbone block codebook fingerprint layout manifest moments rank recipe"
    assert set(words.split()) | {"residual", "shard", "block size", "zero point"} <= set(TERMS)
