"""What a matrix is the weight of, and what follows for how it lies in a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Kind = Literal["linear", "embedding", "conv1d"]
"""What a matrix is the weight of: y = x W^T + b, stored as W (out, in); a table of rows, which are
looked up, stored as (num_embeddings, dim), which stand for out and in; a linear layer stored as
W^T (in, out), transformers' Conv1D."""


def turned(weight: torch.Tensor, kind: Kind) -> torch.Tensor:
    """A matrix as the source stores it to (out, in), or back; a view."""
    return weight.T if kind == "conv1d" else weight


def turned_shape(shape: tuple[int, int], kind: Kind) -> tuple[int, int]:
    """What :func:`turned` makes of a shape."""
    return (shape[1], shape[0]) if kind == "conv1d" else shape
