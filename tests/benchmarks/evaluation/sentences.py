"""Labelled sentences: movie reviews from the package index, or the user's own file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.packaged import rated_texts

_CLEAR = 0.5  # mean ratings from -4 to 4; nearer to zero is neither positive nor negative


@dataclass(frozen=True)
class Sentence:
    text: str
    label: int

    @property
    def split(self) -> str:
        """ "train" (80 %), "validation" or "test", by a hash of the text."""
        bucket = hashlib.sha256(self.text.encode()).digest()[0] % 10
        return {0: "test", 1: "validation"}.get(bucket, "train")


def read(file: Path) -> list[Sentence]:
    """Lines of ``label<TAB>text``, labels counting from 0."""
    pairs = (line.split("\t", 1) for line in file.read_text("utf-8").splitlines() if line)
    return [Sentence(text, int(label)) for label, text in pairs]


def movie_reviews(file: Path) -> None:
    """Write the 10,072 clearly positive (1) or negative (0) review sentences to ``file``."""
    kept = []
    for _, rating, text in rated_texts("movieReviewSnippets"):
        if abs(rating) >= _CLEAR:
            kept.append(f"{int(rating > 0)}\t{text}")
    file.write_text("\n".join(kept) + "\n", "utf-8")
