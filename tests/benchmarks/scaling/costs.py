"""How long a matrix of a shape takes, and hashing a byte, measured on one device."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import loftq_cli

MOST = 1 << 24
"""Elements of a matrix that is measured: of a larger one so many rows, as time goes by rows."""
SETTINGS: dict[str, Any] = {"bits": 2, "rank": 16, "iters": 5}


@dataclass(frozen=True)
class Costs:
    """Seconds of a matrix by (rows, columns), and seconds of hashing a byte; on ``device``."""

    matrices: Mapping[tuple[int, int], float]
    byte: float
    device: str

    @staticmethod
    def read(path: Path) -> Costs:
        held = json.loads(path.read_text())
        matrices = {(rows, columns): s for rows, columns, s in held["matrices"]}
        return Costs(matrices, held["byte"], held["device"])

    def write(self, path: Path) -> None:
        matrices = [[*shape, seconds] for shape, seconds in self.matrices.items()]
        held = {"matrices": matrices, "byte": self.byte, "device": self.device}
        path.write_text(json.dumps(held, indent=1))

    def faster(self, times: float) -> Costs:
        """A device so many times as fast, which hashes no faster."""
        matrices = {shape: seconds / times for shape, seconds in self.matrices.items()}
        return Costs(matrices, self.byte, f"{self.device}, {times:g} times as fast")


def measure(shapes: Iterable[tuple[int, int]], device: str = "cpu") -> Costs:
    """The costs of ``shapes``, each measured once after a small one; on one thread of a CPU."""
    torch.set_num_threads(1)
    found = {}
    _seconds(512, 512, device)
    for rows, columns in sorted(set(shapes)):
        some = max(1, min(rows, MOST // columns))
        found[rows, columns] = _seconds(some, columns, device) * rows / some
    content = bytes(256 << 20)
    began = time.perf_counter()
    hashlib.sha256(content).digest()
    byte = (time.perf_counter() - began) / len(content)
    named = "one CPU core" if device == "cpu" else torch.cuda.get_device_name(device)
    return Costs(found, byte, named)


def _seconds(rows: int, columns: int, device: str) -> float:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    weight = weight.to(device)
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    loftq_cli.decompose(weight, **SETTINGS)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began
