"""Tensors of finished outputs: where each lies, checked against what the manifest says of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from loftq_cli.checkpoint.header import StoredTensor, TensorSpec
from loftq_cli.checkpoint.reader import read_tensor
from loftq_cli.errors import VerificationError

Stored = Mapping[str, tuple[Path, StoredTensor]]
"""File and place of every tensor, by name."""


def find(directory: Path, stored: Stored, spec: TensorSpec) -> tuple[Path, StoredTensor]:
    """File and place of the tensor ``spec`` of the output in ``directory``. Raises
    VerificationError if it is missing or of another dtype or shape."""
    if spec.name not in stored:
        raise VerificationError(f"{directory}: tensor {spec.name!r} is missing")
    path, tensor = stored[spec.name]
    if (tensor.dtype, tensor.shape) != (spec.dtype, spec.shape):
        raise VerificationError(
            f"{path}: tensor {spec.name!r} is {tensor.dtype} {list(tensor.shape)}, "
            f"not {spec.dtype} {list(spec.shape)}"
        )
    return path, tensor


def read(directory: Path, stored: Stored, spec: TensorSpec) -> torch.Tensor:
    """The tensor ``spec``, found as by :func:`find`, in its own dtype."""
    return read_tensor(*find(directory, stored, spec))
