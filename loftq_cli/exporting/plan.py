"""What becomes of every tensor if the codes of a conversion move to another layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.header import StoredTensor, TensorSpec
from loftq_cli.checkpoint.output import MANIFEST, Output
from loftq_cli.checkpoint.source import CONFIG, INDEX, Source
from loftq_cli.checkpoint.stored import Stored, find, read
from loftq_cli.checkpoint.writer import place
from loftq_cli.errors import LayoutError
from loftq_cli.families.blocks import stacks
from loftq_cli.families.experts import is_expert
from loftq_cli.families.kinds import turned_shape
from loftq_cli.layouts import adapter as adapters
from loftq_cli.layouts.base import Layout, Matrix, Surroundings, matrix_of
from loftq_cli.layouts.registry import layout_of
from loftq_cli.layouts.rescaled import FILE as RESCALING
from loftq_cli.merging.config import merged_config
from loftq_cli.merging.plan import Copied, Merged, MergePlan, parts_of

TRAINED = "adapter"
"""The folder of an export that holds the adapter of --adapter."""


@dataclass(frozen=True)
class Moved:
    """A quantized matrix: ``held`` in a layout, ``wanted`` in another."""

    matrix: Matrix
    held: Layout
    wanted: Layout

    @property
    def specs(self) -> list[TensorSpec]:
        return self.wanted.specs(self.matrix)

    def read(
        self, directory: Path, stored: Stored
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Its tensors in the wanted layout, what those mean, and what is held: float32
        (out, in)."""
        matrix = self.matrix
        tensors = {spec.name: read(directory, stored, spec) for spec in self.held.specs(matrix)}
        values = self.held.decode(matrix, tensors)
        if matrix.held is not None:
            found = self.wanted.encode_values(matrix, values)
        else:
            quantized = self.held.quantized(matrix, tensors)
            assert quantized is not None, "refused before"
            found = self.wanted.encode(matrix, quantized)
        return found, self.wanted.decode(matrix, found), values

    def encoded(self, directory: Path, stored: Stored) -> dict[str, torch.Tensor]:
        """Its tensors in the wanted layout. Raises LayoutError if they would mean other values than
        those that are held."""
        matrix = self.matrix
        found, meant, held = self.read(directory, stored)
        if not torch.equal(meant, held):
            raise LayoutError(
                f"--layout {self.wanted.name} cannot hold {matrix.name}: it would be rounded",
                hint=f"convert anew with --layout {self.wanted.name}: it chooses codes that fit",
            )
        return found


@dataclass(frozen=True)
class Requantized:
    """A quantized matrix and its trained adapter, ``merged``, to be quantized again."""

    matrix: Matrix
    wanted: Layout
    merged: Merged

    @property
    def specs(self) -> list[TensorSpec]:
        return self.wanted.specs(self.matrix)


Item = Copied | Merged | Moved | Requantized
"""What becomes of a tensor, or of a matrix, which is several: its bytes are taken as they are, it
is computed as ``loftq merge`` does, moved, or quantized again."""


def specs_of(items: Sequence[Item]) -> list[TensorSpec]:
    """The tensors that ``items`` become, in order."""
    return [
        spec
        for item in items
        for spec in ([item.spec] if isinstance(item, (Copied, Merged)) else item.specs)
    ]


def name_of(item: Item) -> str:
    """The name of the tensor or the matrix."""
    return item.spec.name if isinstance(item, (Copied, Merged)) else item.matrix.name


@dataclass(frozen=True)
class ExportPlan:
    """``shards``: (file name, its items in order). ``config``: config.json without the
    ``entry``, the quantization_config of ``layout``, None if it has none. ``companions``: files
    that are copied along. ``merging``: the merge, if the result is to have no adapter."""

    output: Output
    layout: Layout
    stored: Stored
    shards: Sequence[tuple[str, Sequence[Item]]]
    config: Mapping[str, Any]
    entry: Mapping[str, Any] | None
    companions: Mapping[str, Path]
    merging: MergePlan | None

    @property
    def matrices(self) -> list[Matrix]:
        """In the manifest's order."""
        found = {item.matrix.name: item.matrix for item in self._quantized()}
        return [found[record["name"]] for record in self.output.records]

    @property
    def kept(self) -> list[TensorSpec]:
        """The tensors that are not quantized."""
        return [
            item.spec
            for _, items in self.shards
            for item in items
            if isinstance(item, (Copied, Merged))
        ]

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

    def _quantized(self) -> Iterator[Moved | Requantized]:
        for _, items in self.shards:
            yield from (item for item in items if isinstance(item, (Moved, Requantized)))


def make_export_plan(
    output: Output, source: Source, wanted: Layout, merging: MergePlan | None = None
) -> ExportPlan:
    """How the conversion ``output``, whose files are ``source``, is written in the layout
    ``wanted``, its codes as they are or, with a ``merging``, quantized again.

    Raises LayoutError, with every matrix that the layout cannot hold and the reason, and
    VerificationError if the files are not what the manifest says.
    """
    recipe = output.manifest["recipe"]
    stored = source.stored
    moved, parts = {}, {}
    for record in output.records:
        matrix, held = matrix_of(record), layout_of(record, recipe)
        moved[matrix.name] = Moved(matrix, held, wanted)
        for spec in held.specs(matrix):
            find(output.directory, stored, spec)
            parts[spec.name] = matrix.name
    if merging is None:
        config = source.config.content
        shards = [
            (shard.name, list(_items(shard.header.tensors, shard.path, parts, moved)))
            for shard in source.shards
        ]
        companions: Mapping[str, Path] = _companions(output, [name for name, _ in shards])
    else:
        config, companions = merged_config(merging), merging.companions
        shards = [
            (shard, [_requantized(part, moved) for item in items for part in parts_of(item)])
            for shard, items in merging.shards
        ]
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    plan = ExportPlan(output, wanted, stored, shards, config, None, companions, merging)
    surroundings = _surroundings(plan)
    _refuse(plan, list(moved.values()), surroundings)
    return replace(plan, entry=wanted.quantization_config(plan.matrices, surroundings))


def _items(
    tensors: Sequence[StoredTensor],
    file: Path,
    parts: Mapping[str, str],
    moved: Mapping[str, Moved],
) -> Iterator[Item]:
    """What the tensors of a shard become; a matrix stands where its first part is."""
    seen = set()
    for tensor in tensors:
        name = parts.get(tensor.name)
        if name is None:
            spec = TensorSpec(tensor.name, tensor.dtype, tensor.shape)
            yield Copied(spec, file, tensor)
        elif name not in seen:
            seen.add(name)
            yield moved[name]


def _requantized(item: Copied | Merged, moved: Mapping[str, Moved]) -> Item:
    known = moved.get(item.spec.name)
    if known is None or isinstance(item, Copied):
        return item
    rows, columns = item.spec.shape  # tokens may have been added
    matrix = replace(known.matrix, shape=turned_shape((rows, columns), known.matrix.kind))
    return Requantized(matrix, known.wanted, item)


def _companions(output: Output, shards: Sequence[str]) -> dict[str, Path]:
    """Files that are copied as they are, by name."""
    written = {CONFIG, INDEX, MANIFEST, *shards}
    left_out = (f"{adapters.DIRECTORY}/", f"{TRAINED}/")
    names = [entry["name"] for entry in output.manifest["outputs"]]
    return {
        name: output.directory / name
        for name in names
        if name not in written
        and (not name.startswith(left_out) or name == f"{adapters.DIRECTORY}/{RESCALING}")
    }


def _surroundings(plan: ExportPlan) -> Surroundings:
    in_memory = {
        entry["name"]: entry.get("in_memory", entry["name"])
        for entry in plan.output.manifest["passed_through"]
    }
    kept = [
        in_memory.get(spec.name, spec.name).removesuffix(".weight")
        for spec in plan.kept
        if spec.name.endswith(".weight") and len(spec.shape) == 2
    ]
    names = [f"{matrix.adapted}.weight" for matrix in plan.matrices]
    outside = [name for name in names if not stacks([name])]
    return Surroundings(plan.config, kept, stacks(names) + outside)


def _refuse(plan: ExportPlan, moved: Sequence[Moved], surroundings: Surroundings) -> None:
    """Raise LayoutError if the headers tell already that the layout cannot hold what is there."""
    wanted, matrices = plan.layout, plan.matrices
    described = wanted.cannot_describe(surroundings)
    obstacles = [f"this model: {described}"] if described else []
    for item, matrix in zip(moved, matrices, strict=True):
        name = matrix.name
        if matrix.held is not None:
            if plan.merging is not None or not wanted.holds_values:
                obstacles.append(
                    f"{name}: held as {matrix.held.form}, not in codes of a method here"
                )
        elif plan.merging is None and not item.held.holds_codes:
            obstacles.append(f"{name}: layout {item.held.name} holds values, no codes")
        elif is_expert(name) and not wanted.holds_experts:
            obstacles.append(f"{name}: an expert")
        elif matrix.cut is not None and not wanted.holds_everything:
            obstacles.append(f"{matrix.cut.tensor}: of all experts of a layer")
        elif reason := wanted.cannot_hold(matrix):
            obstacles.append(f"{name}: {reason}")
    if not wanted.mixes and len({(matrix.method, matrix.bits) for matrix in matrices}) > 1:
        obstacles.append("matrices of several widths")
    if together := wanted.cannot_combine([each for each in matrices if each.held is None]):
        obstacles.append(together)
    if obstacles:
        raise LayoutError(
            f"--layout {wanted.name} cannot hold " + "; ".join(dict.fromkeys(obstacles)),
            hint="an export keeps methods and widths; convert the model anew for another layout",
        )
