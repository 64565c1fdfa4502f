"""Conversions that can be exported, and what their codes mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loftq_cli.layouts.base import matrix_of
from loftq_cli.layouts.registry import layout_of
from tests.support.contents import manifest, stored

SETTINGS: dict[str, Any] = {
    "bits": 4,
    "method": "uniform",
    "rank": 4,
    "iters": 2,
    "threads": 1,
    "block_size": 32,
}


def decoded(directory: Path) -> dict[str, torch.Tensor]:
    """Q of every matrix, and the other tensors as they are."""
    held, told = stored(directory), manifest(directory)
    values = {}
    for record in told["matrices"]:
        matrix, layout = matrix_of(record), layout_of(record, told["recipe"])
        parts = {spec.name: held.pop(spec.name) for spec in layout.specs(matrix)}
        values[matrix.name] = layout.decode(matrix, parts)
    return values | held
