"""The statistics that weight conversions, each made once."""

from __future__ import annotations

from pathlib import Path

import torch

from loftq_cli.statistics.file import open_statistics
from tests.benchmarks.language.text import LENGTH
from tests.benchmarks.moments import calibrate, diagonals


def prepare(name: str, model: Path, work: Path) -> Path:
    """The file NAME.safetensors in ``work``, KIND-TOKENS by its name, or brown-KIND-TOKENS, of that
    corpus; made unless it is there."""
    *corpus, kind, tokens = name.split("-")
    full = work / "-".join([*corpus, "full", f"{tokens}.safetensors"])
    text = work / ("brown-refinement.txt" if corpus else "calibration.txt")
    calibrate(model, text, full, int(tokens), LENGTH)
    target = work / f"{name}.safetensors"
    if kind == "diagonal":
        diagonals(full, target)
    return target


def moments(file: Path) -> dict[str, torch.Tensor]:
    """{module: full moments (in, in) of its inputs}, one tensor for each distinct input."""
    opened = open_statistics(file)
    first: dict[str, str] = {}
    for matrix, entry in opened.matrices.items():
        first.setdefault(entry, matrix)
    read = {entry: opened.moments(matrix) for entry, matrix in first.items()}
    return {
        matrix.removesuffix(".weight"): read[entry] for matrix, entry in opened.matrices.items()
    }
