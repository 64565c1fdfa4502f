"""GGUF files written tensor by tensor, for the tests with llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from loftq_cli.exporting.gguf.file import Written


def written(path: Path, header: Written, values: Sequence[torch.Tensor]) -> Path:
    """A file with these tensors."""
    with path.open("wb") as file:
        file.write(header.raw)
        for tensor, value in zip(header.tensors, values, strict=True):
            file.seek(tensor.start)
            file.write(value.contiguous().numpy().tobytes())
        file.truncate(header.nbytes)
    return path
