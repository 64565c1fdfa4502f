"""What a merge will write, settled before anything is computed: every tensor of the result, and
where its parts come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.checkpoint.header import StoredTensor, TensorSpec
from loftq_cli.checkpoint.output import Output
from loftq_cli.checkpoint.source import Source
from loftq_cli.checkpoint.stored import Stored, find
from loftq_cli.checkpoint.writer import place
from loftq_cli.conversion.architecture import kind_of
from loftq_cli.conversion.merge_match import (
    match_names,
    place_pairs,
    place_whole,
    refuse_incomplete,
    refuse_other_backbone,
    refuse_other_conversion,
    refuse_tied,
)
from loftq_cli.errors import InputError
from loftq_cli.layouts import Layout, layout_of
from loftq_cli.layouts.base import Matrix, matrix_of
from loftq_cli.layouts.trained import Pair, TrainedAdapter


@dataclass(frozen=True)
class Copied:
    """A tensor whose bytes are taken from ``file`` as they are."""

    spec: TensorSpec
    file: Path
    tensor: StoredTensor


@dataclass(frozen=True)
class Merged:
    """A tensor that is computed: a quantized matrix, or the floating-point tensor of the same name,
    plus the product of ``pair``, ``transposed`` or as it is."""

    spec: TensorSpec
    quantized: tuple[Layout, Matrix] | None
    pair: Pair | None
    transposed: bool


@dataclass(frozen=True)
class MergePlan:
    """``shards``: (file name, tensors in order). Of the tensors that the adapter holds whole,
    ``added`` are new to the backbone, ``replaced`` are the names of the others."""

    output: Output
    backbone: Source
    adapter: TrainedAdapter
    stored: Stored
    shards: Sequence[tuple[str, Sequence[Copied | Merged]]]
    added: Sequence[TensorSpec]
    replaced: Sequence[str]

    @property
    def merged(self) -> list[Merged]:
        """The computed tensors."""
        return [item for _, items in self.shards for item in items if isinstance(item, Merged)]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(item.spec.nbytes for _, items in self.shards for item in items)

    @property
    def disk_bytes(self) -> int:
        """Bytes of all tensor files, headers included."""
        headers = (place([item.spec for item in items])[0] for _, items in self.shards)
        return self.tensor_bytes + sum(map(len, headers))

    @property
    def dtype(self) -> str | None:
        """The dtype tag of the computed tensors, None where they differ."""
        tags = {item.spec.dtype for item in self.merged}
        return tags.pop() if len(tags) == 1 else None


def make_merge_plan(
    output: Output, backbone: Source, adapter: TrainedAdapter, dtype: str | None
) -> MergePlan:
    """Give every tensor of ``adapter`` its place in ``backbone``; ``dtype`` is a tag, None the one
    that each matrix had before the conversion.

    Raises VerificationError where the backbone is not what the manifest says, InputError where the
    adapter does not belong to it, UnsupportedInputError where one name would stand for two tensors.
    """
    refuse_other_conversion(output, adapter)
    stored = {t.name: (shard.path, t) for shard in backbone.shards for t in shard.header.tensors}
    matrices, parts = _checked_matrices(output, stored)
    shapes = {name: tensor.shape for name, (_, tensor) in stored.items() if name not in parts}
    shapes |= {name: matrix.stored_shape for name, (_, matrix) in matrices.items()}
    names = match_names(adapter, [name.removesuffix(".weight") for name in shapes])
    config = backbone.config.content
    kinds = {name: kind_of(name, config) for name in shapes}
    kinds |= {name: matrix.kind for name, (_, matrix) in matrices.items()}
    pairs = place_pairs(adapter, names, stored, matrices, shapes, kinds)
    whole = place_whole(adapter, names, shapes)
    if both := sorted(set(whole) & set(pairs)):
        raise InputError(f"{adapter.file}: {', '.join(both[:5])}: a whole tensor and a pair for it")
    refuse_other_backbone(adapter, names, stored)
    refuse_incomplete(adapter, names, matrices, {*pairs, *whole})
    refuse_tied(backbone, adapter, whole, shapes)

    def settle(tensor: StoredTensor, path: Path) -> Copied | Merged | None:
        found = matrices.get(parts.get(tensor.name, ""))
        name = found[1].name if found else tensor.name
        if name in seen:
            return None  # another part of a matrix
        seen.add(name)
        if name in whole:
            return _copied(name, adapter.file, whole[name])
        pair = pairs.get(name)
        if found is None and pair is None:
            return _copied(name, path, tensor)
        tag = dtype or (found[1] if found else tensor).dtype
        turned = pair is not None and (pair.embedding or kinds[name] == "conv1d")
        return Merged(TensorSpec(name, tag, shapes[name]), found, pair, turned)

    seen = set[str]()
    shards = []
    for shard in backbone.shards:
        items = [settle(tensor, shard.path) for tensor in shard.header.tensors]
        shards.append((shard.name, [item for item in items if item is not None]))
    added = [_copied(name, adapter.file, whole[name]) for name in whole if name not in shapes]
    shards[-1][1].extend(added)
    return MergePlan(
        output=output,
        backbone=backbone,
        adapter=adapter,
        stored=stored,
        shards=shards,
        added=[item.spec for item in added],
        replaced=[name for name in whole if name in shapes],
    )


def _copied(name: str, file: Path, tensor: StoredTensor) -> Copied:
    return Copied(TensorSpec(name, tensor.dtype, tensor.shape), file, tensor)


def _checked_matrices(
    output: Output, stored: Stored
) -> tuple[dict[str, tuple[Layout, Matrix]], dict[str, str]]:
    """(the quantized matrices by name, name of every stored part -> name of its matrix)."""
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
    return matrices, parts
