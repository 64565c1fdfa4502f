"""Matrices of unusual shapes and values, as the only layers of one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tests.support import checkpoints

SHAPES = [
    (1, 1),
    (1, 64),
    (64, 1),
    (1, 300),
    (300, 1),
    (2, 3),
    (7, 13),
    (31, 37),
    (5, 257),
    (3, 31),
]


def shapes() -> dict[str, torch.Tensor]:
    """Gaussian matrices (out, in), float32, by their shape."""
    generator = torch.Generator().manual_seed(0)
    return {str(shape): torch.randn(*shape, generator=generator) for shape in SHAPES}


def values(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """Float32 matrices (rows, columns) by what is unusual about their values."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    one = torch.zeros(rows, columns)
    one[rows // 2, -1] = 0.7
    outlier = drawn(rows, columns)
    outlier[rows // 3, 5] = 1e5
    return {
        "zeros": torch.zeros(rows, columns),
        "equal": torch.full((rows, columns), -0.3),
        "equal rows": drawn(1, columns).expand(rows, columns),
        "constant rows": drawn(rows, 1).expand(rows, columns),
        "rows of zeros": drawn(rows, columns) * (torch.arange(rows) % 3 == 1)[:, None],
        "blocks of zeros": drawn(rows, columns) * (torch.arange(columns) // 32 % 2),
        "one value": one,
        "one outlier": outlier,
        "positive": drawn(rows, columns).abs() + 3,
        "tiny": drawn(rows, columns) * 1e-30,
        "huge": drawn(rows, columns) * 1e30,
        "tiny to huge": drawn(rows, columns) * 10.0 ** torch.linspace(-15, 15, rows)[:, None],
    }


class OddConfig(transformers.PretrainedConfig):
    model_type = "odd"

    def __init__(self, shapes: Any = (), **options: Any) -> None:
        self.shapes = [list(shape) for shape in shapes]
        super().__init__(**options)


class OddModel(transformers.PreTrainedModel):
    """A list of layers, each of which is given an input of its own."""

    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        layers = [nn.Linear(columns, rows, bias=False) for rows, columns in config.shapes]
        self.layers = nn.ModuleList(layers)
        self.post_init()

    def forward(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [layer(given) for layer, given in zip(self.layers, inputs, strict=True)]


def write(directory: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A checkpoint whose layers are ``weights``, in this order."""
    sizes = [list(weight.shape) for weight in weights.values()]
    config = {"architectures": ["OddModel"], "model_type": "odd", "shapes": sizes}
    tensors = {f"layers.{number}.weight": weight for number, weight in enumerate(weights.values())}
    return checkpoints.write(directory, tensors, config)
