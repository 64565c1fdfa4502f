"""General English prose: sentences of newspaper editorials, in three parts without a common one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch

from tests.benchmarks.packaged import rated_texts

Part = Literal["calibration", "training", "evaluation"]

LENGTH = 512  # tokens a window
EVALUATED = 4  # windows: 2,044 tokens are predicted
_OF_EVALUATION, _OF_TRAINING = 2, 4  # tenths of the documents; the others are for calibration


def part_of(document: str) -> Part:
    """Which part an editorial belongs to, by a hash of its number."""
    bucket = hashlib.sha256(document.encode()).digest()[0] % 10
    if bucket < _OF_EVALUATION:
        return "evaluation"
    return "training" if bucket < _OF_EVALUATION + _OF_TRAINING else "calibration"


def documents(sentences: Iterable[tuple[str, str]]) -> dict[str, str]:
    """{number: text} of the editorials whose sentences these are, (number_sentence, text)."""
    found: dict[str, list[str]] = {}
    for name, sentence in sentences:
        found.setdefault(name.partition("_")[0], []).append(sentence)
    return {number: " ".join(sentences) for number, sentences in found.items()}


def write_parts(work: Path) -> None:
    """``PART.txt`` in ``work`` for every part, a document a paragraph, unless they are there."""
    if (work / "evaluation.txt").is_file():
        return
    parts: dict[Part, list[str]] = {"calibration": [], "training": [], "evaluation": []}
    rated = rated_texts("nytEditorialSnippets")
    for number, text in documents((name, text) for name, _, text in rated).items():
        parts[part_of(number)].append(text)
    for part, texts in parts.items():
        (work / f"{part}.txt").write_text("\n\n".join(texts) + "\n", "utf-8")


def windows(tokenizer: object, file: Path) -> torch.Tensor:
    """The text in ``file`` as int64 (windows, LENGTH), the incomplete last window left out."""
    tokens = tokenizer(file.read_text("utf-8"))["input_ids"]  # type: ignore[operator]
    count = len(tokens) // LENGTH
    return torch.tensor(tokens[: count * LENGTH]).view(count, LENGTH)


def spread(found: torch.Tensor) -> torch.Tensor:
    """EVALUATED of the windows ``found``, from all of the text."""
    return found[:: len(found) // EVALUATED][:EVALUATED]
