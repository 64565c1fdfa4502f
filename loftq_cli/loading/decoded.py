"""A backbone of somebody else's quantizer, as the values that it means: where what would keep it
packed in memory is not installed, or not able to."""

from __future__ import annotations

from typing import Any

import torch

from loftq_cli.checkpoint.dtypes import torch_dtype
from loftq_cli.checkpoint.output import Output
from loftq_cli.checkpoint.quantized import KEYS
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.checkpoint.source import open_source
from loftq_cli.checkpoint.stored import read
from loftq_cli.families.kinds import turned
from loftq_cli.layouts.base import Matrix, matrix_of
from loftq_cli.layouts.registry import layout_of


class DecodedBackbone(UserWarning):
    """A backbone was decoded: it takes the memory that the model itself would."""


def state_dict(output: Output) -> dict[str, torch.Tensor]:
    """Every tensor of the backbone of ``output`` by its name in a checkpoint of the model, matrices
    in the dtype that their consumers decode them to."""
    stored = open_source(output.directory).stored
    found: dict[str, torch.Tensor] = {}
    parts: set[str] = set()
    for record in output.records:
        matrix = matrix_of(record)
        layout = layout_of(record, output.manifest["recipe"])
        tensors = {s.name: read(output.directory, stored, s) for s in layout.specs(matrix)}
        parts |= tensors.keys()
        found[matrix.name] = _as_stored(matrix, layout.decode(matrix, tensors))
    for name, (path, tensor) in stored.items():
        if name not in parts:
            with TensorFile(path) as file:
                found[name] = file.read(tensor)
    return found


def _as_stored(matrix: Matrix, values: torch.Tensor) -> torch.Tensor:
    assert matrix.held is not None
    return turned(values, matrix.kind).to(torch_dtype(matrix.held.dtype)).contiguous()


def without_quantization(config: Any) -> Any:
    """``config``, a transformers config, that says nothing of it."""
    for key in KEYS:
        if hasattr(config, key):
            delattr(config, key)
    return config
