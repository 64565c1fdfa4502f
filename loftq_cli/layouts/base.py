"""What a layout is: how a quantized matrix becomes named tensors and config entries, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.families.kinds import Kind, turned_shape
from loftq_cli.numerics.quantizers.methods import Quantized


@dataclass(frozen=True)
class Matrix:
    """A weight matrix that is to be, or was, quantized.

    ``name`` is the tensor's (``….weight``), ``dtype`` its safetensors tag in the source, ``shape``
    (out, in), whichever way it is stored. ``in_memory``: the name of its module in the class that
    config.json names, if that is another than on disk.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    method: str
    bits: int
    block_size: int
    kind: Kind = "linear"
    in_memory: str | None = None

    @property
    def stored_shape(self) -> tuple[int, int]:
        """The shape of the source's tensor."""
        return turned_shape(self.shape, self.kind)

    @property
    def module(self) -> str:
        """The module's name on disk."""
        return self.name.removesuffix(".weight")

    @property
    def adapted(self) -> str:
        """The module's name in the adapter, which is that in memory: so PEFT itself saves it."""
        return self.in_memory or self.module

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]


def matrix_of(record: Mapping[str, Any]) -> Matrix:
    """The matrix that an entry of the manifest's ``matrices`` describes."""
    rows, columns = record["shape"]
    return Matrix(
        record["name"],
        (rows, columns),
        record["dtype"],
        record["method"],
        record["bits"],
        record["block_size"],
        record.get("kind", "linear"),
        record.get("in_memory"),
    )


@dataclass(frozen=True)
class Surroundings:
    """What else a consumer's config needs to know: the backbone's config.json so far, modules with
    two-dimensional weights that stay as they are, and the path of each stack of blocks. All names
    are those in memory."""

    config: Mapping[str, Any]
    kept_modules: Sequence[str]
    stacks: Sequence[str]


class Layout(Protocol):
    """One way to store quantized matrices. Stateless."""

    name: str
    scale_dtype: torch.dtype
    """What a quantizer rounds each scale to as it fits it."""
    mixes: bool
    """Whether matrices of several widths and methods can be in one output."""
    imports: tuple[str, ...]
    """The packages that have to be importable where an output is loaded and trained."""
    extra: str
    """Our extra that installs them."""

    def cannot_hold(self, matrix: Matrix) -> str | None:
        """Why this layout cannot hold ``matrix``, or None."""

    def cannot_describe(self, surroundings: Surroundings) -> str | None:
        """Why this layout's config cannot name the quantized modules of this model, or None."""

    def rounding(self, matrix: Matrix) -> torch.dtype | None:
        """The dtype that Q itself is rounded to, None where codes and scales are stored."""

    def specs(self, matrix: Matrix) -> list[TensorSpec]:
        """The tensors that :meth:`encode` will return, known before anything is computed."""

    def encode(self, matrix: Matrix, quantized: Quantized) -> dict[str, torch.Tensor]:
        """The stored tensors of a quantized matrix, by name."""

    def decode(self, matrix: Matrix, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Q, float32 (out, in), from stored tensors of the dtypes and shapes of :meth:`specs`.

        Raises CorruptFileError where their values make no sense."""

    def quantization_config(
        self, matrices: Sequence[Matrix], surroundings: Surroundings
    ) -> dict[str, Any] | None:
        """The entry for config.json, or None where the output is an ordinary checkpoint."""
