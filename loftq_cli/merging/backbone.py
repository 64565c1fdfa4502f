"""The tensors of a conversion that is merged, under the names that they had in the source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.header import StoredTensor, TensorSpec
from loftq_cli.checkpoint.output import Output
from loftq_cli.checkpoint.reader import read_tensor
from loftq_cli.checkpoint.source import Source
from loftq_cli.checkpoint.stored import Stored, find, read
from loftq_cli.errors import UnsupportedInputError
from loftq_cli.families.architecture import kind_of
from loftq_cli.families.kinds import Kind, turned
from loftq_cli.layouts.base import Layout, Matrix, matrix_of
from loftq_cli.layouts.registry import layout_of
from loftq_cli.layouts.trained_parts import Pair, TokenRows


@dataclass(frozen=True)
class InFile:
    """A tensor in a file."""

    file: Path
    tensor: StoredTensor

    @property
    def dtype(self) -> str:
        """Its dtype tag."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def in_file(self) -> InFile:
        return self

    def read(self) -> torch.Tensor:
        """The tensor in float32."""
        return read_tensor(self.file, self.tensor).float()


@dataclass(frozen=True)
class StoredMatrix:
    """A quantized matrix, whose parts are ``stored`` in the output in ``directory``."""

    layout: Layout
    matrix: Matrix
    directory: Path
    stored: Stored = field(compare=False, repr=False)

    @property
    def dtype(self) -> str:
        """The dtype tag that it had in the source."""
        return self.matrix.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As the source has it."""
        return self.matrix.stored_shape

    @property
    def in_file(self) -> None:
        return None

    def read(self) -> torch.Tensor:
        """The matrix in float32, as the source stores it. Raises VerificationError if a part is
        missing or of another dtype or shape."""
        return turned(self.layout.decode(self.matrix, self.parts()), self.matrix.kind).contiguous()

    def parts(self) -> dict[str, torch.Tensor]:
        """Its stored tensors. Raises as :meth:`read`."""
        specs = self.layout.specs(self.matrix)
        return {spec.name: read(self.directory, self.stored, spec) for spec in specs}


@dataclass(frozen=True)
class Weight:
    """What a tensor of the result is made of: ``base``, plus the product of ``pair``, or with
    ``tokens`` in the place of rows. If ``shape`` has more columns than the base, they are zero."""

    base: InFile | StoredMatrix
    shape: tuple[int, ...]
    pair: Pair | None = None
    tokens: TokenRows | None = None

    @property
    def is_quantized(self) -> bool:
        return self.base.in_file is None

    @property
    def copied(self) -> InFile | None:
        """The tensor whose bytes are the result, None if something is computed."""
        plain = not self.pair and not self.tokens and self.base.shape == self.shape
        return self.base.in_file if plain else None

    def read_base(self) -> torch.Tensor:
        """The base (``shape``) in float32, as the source stores it."""
        value = self.base.read()
        missing = self.shape[-1] - value.shape[-1]
        return torch.nn.functional.pad(value, (0, missing)) if missing else value


def as_it_is(file: Path, tensor: StoredTensor) -> Weight:
    """A ``tensor`` of a ``file`` and nothing else."""
    return Weight(InFile(file, tensor), tensor.shape)


@dataclass(frozen=True)
class Backbone:
    """``stored``: the tensors of the files, ``matrices`` the quantized ones by name, ``parts`` the
    name of a matrix by that of each of its stored tensors; ``stacks`` the names of those that are
    one tensor of the source, in order, by its name; ``shapes`` and ``kinds`` of all tensors,
    as the source has them."""

    output: Output
    source: Source
    stored: Stored
    matrices: Mapping[str, StoredMatrix]
    parts: Mapping[str, str]
    stacks: Mapping[str, Sequence[str]]
    shapes: Mapping[str, tuple[int, ...]]
    kinds: Mapping[str, Kind]

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json."""
        return self.source.config.content

    def weight(self, name: str, pair: Pair | None = None) -> Weight:
        """The tensor ``name``, plus the product of ``pair``."""
        return Weight(self.base(name), self.shapes[name], pair)

    def base(self, name: str) -> InFile | StoredMatrix:
        """The tensor ``name`` before training."""
        return self.matrices.get(name) or InFile(*self.stored[name])


def open_backbone(output: Output, source: Source) -> Backbone:
    """The backbone of ``output``, whose files are ``source``. Raises VerificationError if a
    tensor is missing, or of another dtype or shape than the manifest says, UnsupportedInputError
    for matrices of somebody else's backbone that were left in codes."""
    stored = source.stored
    matrices, parts = {}, {}
    cuts: dict[str, dict[int, str]] = {}
    for record in output.records:
        matrix = matrix_of(record)
        layout = layout_of(record, output.manifest["recipe"])
        matrices[matrix.name] = StoredMatrix(layout, matrix, output.directory, stored)
        for spec in layout.specs(matrix):
            find(output.directory, stored, spec)
            parts[spec.name] = matrix.name
        if matrix.cut is not None:
            cuts.setdefault(matrix.cut.tensor, {})[matrix.cut.index] = matrix.name
    for entry in output.manifest["passed_through"]:
        if "backbone" in output.manifest and entry["name"] not in stored:
            raise UnsupportedInputError(
                f"{output.directory}: {entry['name']} is in codes and has no adapter "
                f"({entry['reason']}); only what has one is decoded",
                hint="adapt every quantized matrix, or load the backbone with its own library",
            )
        spec = TensorSpec(entry["name"], entry["dtype"], tuple(entry["shape"]))
        find(output.directory, stored, spec)
    shapes = {name: tensor.shape for name, (_, tensor) in stored.items() if name not in parts}
    shapes |= {name: quantized.shape for name, quantized in matrices.items()}
    kinds = {name: kind_of(name, source.config.content) for name in shapes}
    kinds |= {name: quantized.matrix.kind for name, quantized in matrices.items()}
    stacks = {name: [held[index] for index in sorted(held)] for name, held in cuts.items()}
    return Backbone(output, source, stored, matrices, parts, stacks, shapes, kinds)
