"""What evaluations take from the package indices: fetched by pip or npm, and never kept here."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

_SENTENCES = "vadersentiment==3.3.2"
_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"


def fetch(package: str, directory: Path, *options: str) -> Path:
    """Download ``package`` without its dependencies into the empty ``directory``; the file."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *options, package]
    subprocess.run([*command, "-d", str(directory)], check=True, stderr=subprocess.DEVNULL)
    (file,) = directory.iterdir()
    return file


def packed_by_npm(package: str) -> dict[str, bytes]:
    """The files of an npm package, by their names in its archive."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["npm", "pack", "--silent", package], cwd=scratch, check=True)
        (file,) = Path(scratch).iterdir()
        with tarfile.open(file) as archive:
            members = {member.name: archive.extractfile(member) for member in archive}
            return {name: held.read() for name, held in members.items() if held is not None}


def rated_texts(name: str) -> list[tuple[str, float, str]]:
    """(id, mean rating, text) of one of vaderSentiment's files: ``movieReviewSnippets`` or
    ``nytEditorialSnippets`` (ids there are editorial_sentence)."""
    with tempfile.TemporaryDirectory() as scratch:
        file = fetch(_SENTENCES, Path(scratch), "--no-binary", ":all:")
        with tarfile.open(file) as package:
            inner = package.extractfile(_ARCHIVE)
            assert inner is not None
            with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
                member = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
                assert member is not None
                lines = member.read().decode("utf-8").splitlines()
    fields = (line.split("\t") for line in lines)
    return [(name, float(rating), text) for name, rating, text in fields]
