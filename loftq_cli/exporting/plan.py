"""What becomes of every tensor if the codes of a conversion move to another layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.header import StoredTensor, TensorSpec
from loftq_cli.checkpoint.output import Output
from loftq_cli.checkpoint.source import Source
from loftq_cli.checkpoint.stored import Stored, find, read
from loftq_cli.checkpoint.writer import place
from loftq_cli.errors import LayoutError
from loftq_cli.families.blocks import stacks
from loftq_cli.families.experts import is_expert
from loftq_cli.layouts.base import Layout, Matrix, Surroundings, matrix_of
from loftq_cli.layouts.registry import layout_of, make_layout


@dataclass(frozen=True)
class Kept:
    """A tensor whose bytes are taken as they are."""

    file: Path
    tensor: StoredTensor

    @property
    def specs(self) -> list[TensorSpec]:
        tensor = self.tensor
        return [TensorSpec(tensor.name, tensor.dtype, tensor.shape)]


@dataclass(frozen=True)
class Moved:
    """A quantized matrix: ``held`` in a layout, ``wanted`` in another."""

    matrix: Matrix
    held: Layout
    wanted: Layout

    @property
    def specs(self) -> list[TensorSpec]:
        return self.wanted.specs(self.matrix)

    def encoded(self, directory: Path, stored: Stored) -> dict[str, torch.Tensor]:
        """Its tensors in the wanted layout. Raises LayoutError if they would mean other values than
        those that are held."""
        matrix = self.matrix
        tensors = {spec.name: read(directory, stored, spec) for spec in self.held.specs(matrix)}
        quantized = self.held.quantized(matrix, tensors)
        assert quantized is not None, "refused before"
        found = self.wanted.encode(matrix, quantized)
        if not torch.equal(self.wanted.decode(matrix, found), self.held.decode(matrix, tensors)):
            raise LayoutError(
                f"--layout {self.wanted.name} cannot hold {matrix.name}: it would be rounded",
                hint=f"convert anew with --layout {self.wanted.name}: it chooses codes that fit",
            )
        return found


@dataclass(frozen=True)
class ExportPlan:
    """``shards``: (file name, its tensors in order). ``entry``: the quantization_config of
    ``layout``, None if it has none."""

    output: Output
    layout: Layout
    stored: Stored
    shards: Sequence[tuple[str, Sequence[Kept | Moved]]]
    config: Mapping[str, Any]
    entry: Mapping[str, Any] | None

    @property
    def matrices(self) -> list[Matrix]:
        return [matrix_of(record) for record in self.output.records]

    @property
    def transposed(self) -> bool:
        """Whether some weights are stored (in, out)."""
        conv1d = any(matrix.kind == "conv1d" for matrix in self.matrices)
        return self.layout.keeps_conv1d and conv1d

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for _, items in self.shards for spec in specs_of(items))

    @property
    def disk_bytes(self) -> int:
        """Bytes of all tensor files, headers included."""
        headers = sum(len(place(specs_of(items))[0]) for _, items in self.shards)
        return self.tensor_bytes + headers


def specs_of(items: Sequence[Kept | Moved]) -> list[TensorSpec]:
    """The tensors that ``items`` become, in order."""
    return [spec for item in items for spec in item.specs]


def make_export_plan(output: Output, source: Source, name: str) -> ExportPlan:
    """How the conversion ``output``, whose files are ``source``, is written in layout ``name``.

    Raises LayoutError, with every matrix that the layout cannot hold and the reason, and
    VerificationError if the files are not what the manifest says.
    """
    recipe = output.manifest["recipe"]
    wanted = make_layout(name, recipe)
    stored = {t.name: (shard.path, t) for shard in source.shards for t in shard.header.tensors}
    moved, parts = {}, {}
    for record in output.records:
        matrix, held = matrix_of(record), layout_of(record, recipe)
        moved[matrix.name] = Moved(matrix, held, wanted)
        for spec in held.specs(matrix):
            find(output.directory, stored, spec)
            parts[spec.name] = matrix.name
    config = {k: v for k, v in source.config.content.items() if k != "quantization_config"}
    surroundings = _surroundings(output, config, [item.matrix for item in moved.values()])
    _refuse(wanted, list(moved.values()), surroundings)
    shards = [
        (shard.name, list(_items(shard.header.tensors, shard.path, parts, moved)))
        for shard in source.shards
    ]
    entry = wanted.quantization_config([item.matrix for item in moved.values()], surroundings)
    return ExportPlan(output, wanted, stored, shards, config, entry)


def _items(
    tensors: Sequence[StoredTensor],
    file: Path,
    parts: Mapping[str, str],
    moved: Mapping[str, Moved],
) -> Iterator[Kept | Moved]:
    """What the tensors of a shard become; a matrix stands where its first part is."""
    seen = set()
    for tensor in tensors:
        name = parts.get(tensor.name)
        if name is None:
            yield Kept(file, tensor)
        elif name not in seen:
            seen.add(name)
            yield moved[name]


def _surroundings(
    output: Output, config: Mapping[str, Any], matrices: Sequence[Matrix]
) -> Surroundings:
    kept = [
        entry.get("in_memory", entry["name"]).removesuffix(".weight")
        for entry in output.manifest["passed_through"]
        if entry["name"].endswith(".weight") and len(entry["shape"]) == 2
    ]
    names = [f"{matrix.adapted}.weight" for matrix in matrices]
    outside = [name for name in names if not stacks([name])]
    return Surroundings(config, kept, stacks(names) + outside)


def _refuse(wanted: Layout, moved: Sequence[Moved], surroundings: Surroundings) -> None:
    """Raise LayoutError if the headers tell already that ``wanted`` cannot hold what is there."""
    matrices = [item.matrix for item in moved]
    described = wanted.cannot_describe(surroundings)
    obstacles = [f"this model: {described}"] if described else []
    for item in moved:
        name = item.matrix.name
        if not item.held.holds_codes:
            obstacles.append(f"{name}: layout {item.held.name} holds values, no codes")
        elif is_expert(name) and not wanted.holds_experts:
            obstacles.append(f"{name}: an expert")
        elif reason := wanted.cannot_hold(item.matrix):
            obstacles.append(f"{name}: {reason}")
    if not wanted.mixes and len({(matrix.method, matrix.bits) for matrix in matrices}) > 1:
        obstacles.append("matrices of several widths")
    if together := wanted.cannot_combine(matrices):
        obstacles.append(together)
    if obstacles:
        raise LayoutError(
            f"--layout {wanted.name} cannot hold " + "; ".join(obstacles),
            hint="an export moves codes as they are; convert the model anew for another layout",
        )
