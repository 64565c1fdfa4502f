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
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(full, "pt") as file:
        kept = {
            name.removesuffix(".full") + ".diagonal": file.get_tensor(name).diagonal().clone()
            for name in file.keys()  # noqa: SIM118 (not a mapping)
        }
        save_file(kept, target, file.metadata())
