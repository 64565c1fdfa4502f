"""The tensors of a conversion that is merged, under the names that they had in the source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.header import StoredTensor, TensorSpec
from loftq_cli.checkpoint.output import Output
from loftq_cli.checkpoint.source import Source
from loftq_cli.checkpoint.stored import Stored, find
from loftq_cli.families.architecture import kind_of
from loftq_cli.families.kinds import Kind
from loftq_cli.layouts.base import Layout, Matrix, matrix_of
from loftq_cli.layouts.registry import layout_of
from loftq_cli.layouts.trained import Pair, TokenRows

Place = tuple[Path, StoredTensor]
"""A tensor in a file."""


@dataclass(frozen=True)
class Weight:
    """What a tensor of the result is made of: ``base``, which is quantized or in a file, plus the
    product of ``pair``, or with ``tokens`` in the place of rows. Where ``shape`` has more columns
    than the base, they are zero."""

    base: Place | tuple[Layout, Matrix]
    shape: tuple[int, ...]
    pair: Pair | None = None
    tokens: TokenRows | None = None

    @property
    def is_quantized(self) -> bool:
        return not isinstance(self.base[1], StoredTensor)

    @property
    def copied(self) -> Place | None:
        """The tensor whose bytes are the result, None if something is computed."""
        first, second = self.base
        if self.pair or self.tokens or not isinstance(second, StoredTensor):
            return None
        assert isinstance(first, Path)
        return (first, second) if second.shape == self.shape else None


@dataclass(frozen=True)
class Backbone:
    """``stored``: the tensors of the files, ``matrices`` the quantized ones by name, ``parts`` the
    name of a matrix by that of each of its stored tensors; ``shapes`` and ``kinds`` of all tensors,
    as the source has them."""

    output: Output
    source: Source
    stored: Stored
    matrices: Mapping[str, tuple[Layout, Matrix]]
    parts: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    kinds: Mapping[str, Kind]

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json."""
        return self.source.config.content

    def weight(self, name: str, pair: Pair | None = None) -> Weight:
        """The tensor ``name``, plus the product of ``pair``."""
        return Weight(self.matrices.get(name) or self.stored[name], self.shapes[name], pair)

    def dtype(self, name: str) -> str:
        """The dtype tag of the tensor ``name``, of a matrix that of the source."""
        held = self.matrices.get(name)
        return held[1].dtype if held else self.stored[name][1].dtype


def open_backbone(output: Output, source: Source) -> Backbone:
    """The backbone of ``output``, whose files are ``source``. Raises VerificationError if a
    tensor is missing, or of another dtype or shape than the manifest says."""
    stored = {t.name: (shard.path, t) for shard in source.shards for t in shard.header.tensors}
    matrices, parts = {}, {}
    for record in output.records:
        matrix = matrix_of(record)
        layout = layout_of(record, output.manifest["recipe"])
        matrices[matrix.name] = layout, matrix
        for spec in layout.specs(matrix):
            find(output.directory, stored, spec)
            parts[spec.name] = matrix.name
    for entry in output.manifest["passed_through"]:
        spec = TensorSpec(entry["name"], entry["dtype"], tuple(entry["shape"]))
        find(output.directory, stored, spec)
    shapes = {name: tensor.shape for name, (_, tensor) in stored.items() if name not in parts}
    shapes |= {name: matrix.stored_shape for name, (_, matrix) in matrices.items()}
    kinds = {name: kind_of(name, source.config.content) for name in shapes}
    kinds |= {name: matrix.kind for name, (_, matrix) in matrices.items()}
    return Backbone(output, source, stored, matrices, parts, shapes, kinds)
