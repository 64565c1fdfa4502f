"""Activation statistics for the evaluations: one run of calibration gives both kinds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def calibrate(model: Path, text: Path, target: Path, tokens: int, length: int) -> None:
    """Write the full moments of ``tokens`` tokens of ``text``, in windows of ``length``, to
    ``target``, unless it is there."""
    if target.is_file():
        return
    command = [sys.executable, "-m", "loftq_cli", "calibrate", str(model), "--text", str(text)]
    command += ["--moments", "full", "--samples", str(tokens // length), "--length", str(length)]
    subprocess.run([*command, "-o", str(target), "-q"], check=True, stdout=subprocess.DEVNULL)


def diagonals(full: Path, target: Path) -> None:
    """Write to ``target`` what calibration would have measured with the diagonals alone."""
    from loftq_cli.statistics.file import open_statistics
    from loftq_cli.statistics.writer import StatisticsWriter

    opened = open_statistics(full)
    sharing: dict[str, list[str]] = {}
    for matrix, entry in opened.matrices.items():
        sharing.setdefault(entry, []).append(matrix)
    with StatisticsWriter(target, opened.matrices, model=opened.model, overwrite=True) as writer:
        for names in sharing.values():
            diagonal = opened.moments(names[0]).diagonal().clone()
            writer.add(names, diagonal, opened.tokens(names[0]))
        writer.publish()
