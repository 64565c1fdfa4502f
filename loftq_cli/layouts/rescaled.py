"""How the original was rescaled before it was compared with a backbone, and the file that says so.

A backbone whose maker multiplied columns by s and divided what is in front by it (AWQ, SmoothQuant)
is a quantization of diag(1/r) W diag(s). ``loftq_rescaling.safetensors``, beside the adapter, has
each s by the module that was divided: float32 (n,).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.header import HeaderError, TensorSpec, read_header
from loftq_cli.checkpoint.output import Output
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.checkpoint.writer import GrowingShard
from loftq_cli.errors import VerificationError

FILE = "loftq_rescaling.safetensors"


@dataclass(frozen=True)
class Rescaled:
    """Of a matrix, which vector its columns were multiplied by, and which its rows, if it is
    shorter the last of them, were divided by."""

    columns: str | None = None
    rows: str | None = None

    def as_dict(self) -> dict[str, str]:
        """As the manifest has it."""
        found = {"columns": self.columns, "rows": self.rows}
        return {key: value for key, value in found.items() if value is not None}


@dataclass(frozen=True)
class Rescaling:
    """``vectors``: float32 (n,), by the module that was divided; ``matrices``: what became of each,
    by the name of its weight. Matrices that are not here stayed as they were."""

    vectors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    matrices: Mapping[str, Rescaled] = field(default_factory=dict)

    @staticmethod
    def of(output: Output) -> Rescaling:
        """That of a finished ``output``. Raises VerificationError if the file is missing, broken,
        or of other matrices."""
        matrices = {
            each["name"]: Rescaled(**each["rescaled"])
            for each in output.records
            if "rescaled" in each
        }
        if not matrices:
            return Rescaling()
        path = output.directory / output.adapter_folder / FILE
        try:
            tensors = {tensor.name: tensor for tensor in read_header(path).tensors}
        except (HeaderError, OSError) as error:
            raise VerificationError(f"{path}: {error}") from error
        with TensorFile(path) as file:
            vectors = {name: file.read(tensor) for name, tensor in tensors.items()}
        for record in output.records:
            found, (rows, columns) = matrices.get(record["name"], Rescaled()), record["shape"]
            named = [(found.columns, range(columns, columns + 1)), (found.rows, range(rows + 1))]
            for name, lengths in named:
                if name is not None and not _is_vector(vectors.get(name), lengths):
                    raise VerificationError(f"{path}: no vector {name!r} for {record['name']}")
        return Rescaling(vectors, matrices)

    def write(self, path: Path) -> None:
        """Write the vectors to ``path``."""
        specs = [TensorSpec(name, "F32", tuple(each.shape)) for name, each in self.vectors.items()]
        with GrowingShard(path, specs) as shard:
            for name, vector in self.vectors.items():
                shard.write(name, vector)
            shard.sync()

    def record(self, name: str) -> dict[str, Any]:
        """What the manifest's entry of a matrix has of it."""
        found = self.matrices.get(name)
        return {} if found is None else {"rescaled": found.as_dict()}

    def columns(self, name: str) -> torch.Tensor | None:
        """What the columns of a matrix were multiplied by, and its inputs divided."""
        found = self.matrices.get(name)
        return None if found is None or found.columns is None else self.vectors[found.columns]

    def applied(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` (out, in) as it was when it was quantized: float32 if that is another."""
        found = self.matrices.get(name)
        if found is None:
            return weight
        weight = weight.float()
        if found.columns is not None:
            weight = weight * self.vectors[found.columns].to(weight.device)
        if found.rows is not None:
            divisor = self.vectors[found.rows].to(weight.device)
            weight = weight.clone()
            weight[-len(divisor) :] /= divisor[:, None]
        return weight

    def moments(self, name: str, moments: torch.Tensor) -> torch.Tensor:
        """The ``moments`` (in,) or (in, in) of the inputs of a matrix, as the backbone has them."""
        columns = self.columns(name)
        if columns is None:
            return moments
        columns = columns.to(moments)
        if moments.dim() == 1:
            return moments / columns.square()
        return moments / columns / columns[:, None]


def _is_vector(tensor: torch.Tensor | None, lengths: range) -> bool:
    if tensor is None or tensor.dtype != torch.float32 or tensor.dim() != 1:
        return False
    return len(tensor) in lengths and bool(((tensor > 0) & tensor.isfinite()).all())
