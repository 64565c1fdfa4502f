"""What a merge will write, settled before anything is computed: every tensor of the result, and
where its parts come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.checkpoint.header import StoredTensor, TensorSpec
from loftq_cli.checkpoint.output import Output
from loftq_cli.checkpoint.source import Shard, Source
from loftq_cli.checkpoint.writer import place as place_in_file
from loftq_cli.families.anatomy import anatomy
from loftq_cli.families.token_tables import token_tables
from loftq_cli.layouts.trained import TrainedAdapter
from loftq_cli.loading.trained_beside import refuse_other_conversion
from loftq_cli.merging.backbone import Backbone, Weight, as_it_is, open_backbone
from loftq_cli.merging.embeddings import Embeddings, settle_embeddings
from loftq_cli.merging.match import Parts, Placed, place, refuse_incomplete
from loftq_cli.merging.names import Names, match_names, places_all, recorded
from loftq_cli.merging.tokenizer import merged_companions
from loftq_cli.merging.vocabulary import Vocabulary, vocabulary_of


@dataclass(frozen=True)
class Copied:
    """A tensor whose bytes are taken from ``file`` as they are."""

    spec: TensorSpec
    file: Path
    tensor: StoredTensor


@dataclass(frozen=True)
class Merged:
    """A tensor that is computed."""

    spec: TensorSpec
    weight: Weight
    transposed: bool
    """Whether the product of the pair is added transposed."""


@dataclass(frozen=True)
class Stacked:
    """A tensor (count, …) that is made of one after the other of ``matrices``; ``transposed``: of
    each (out, in) as (in, out)."""

    spec: TensorSpec
    matrices: Sequence[Copied | Merged]
    transposed: bool


def parts_of(item: Copied | Merged | Stacked) -> Sequence[Copied | Merged]:
    """What is computed or copied at a time."""
    return item.matrices if isinstance(item, Stacked) else [item]


@dataclass(frozen=True)
class MergePlan:
    """``shards``: (file name, tensors in order). ``added`` are the tensors that the backbone lacks,
    ``replaced`` the names of those that the adapter holds whole. ``companions``: the files that
    are copied along, by relative name."""

    output: Output
    source: Source
    adapter: TrainedAdapter
    shards: Sequence[tuple[str, Sequence[Copied | Merged | Stacked]]]
    added: Sequence[TensorSpec]
    replaced: Sequence[str]
    embeddings: Embeddings
    companions: Mapping[str, Path]

    @property
    def merged(self) -> list[Merged]:
        """The computed tensors."""
        held = [item for _, items in self.shards for item in items]
        parts = [part for item in held for part in parts_of(item)]
        return [part for part in parts if isinstance(part, Merged)]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(item.spec.nbytes for _, items in self.shards for item in items)

    @property
    def disk_bytes(self) -> int:
        """Bytes of all tensor files, headers included."""
        headers = (place_in_file([item.spec for item in items])[0] for _, items in self.shards)
        return self.tensor_bytes + sum(map(len, headers))

    @property
    def dtype(self) -> str | None:
        """The dtype tag of the computed tensors, None if they differ."""
        tags = {item.spec.dtype for item in self.merged}
        return tags.pop() if len(tags) == 1 else None


def make_merge_plan(
    output: Output, source: Source, adapter: TrainedAdapter, dtype: str | None
) -> MergePlan:
    """Give every tensor of ``adapter`` its place in the backbone of ``output``, whose files are
    ``source``; ``dtype`` is a tag, None the one that each matrix had before the conversion.

    Raises VerificationError if the backbone is not what the manifest says, InputError if the
    adapter does not belong to it, UnsupportedInputError if one name would stand for two tensors.
    """
    refuse_other_conversion(output, adapter.file, adapter.config)
    backbone = open_backbone(output, source)
    parts = Parts(backbone, adapter, *_names(backbone, adapter))
    placed = place(parts)
    refuse_incomplete(parts, placed)
    embeddings = settle_embeddings(parts, placed)
    result = _Result(parts, placed, embeddings, dtype)
    shards = [
        (shard.name, [result.whole(name) for name in _in_order(shard, backbone)])
        for shard in source.shards
    ]
    added = [result.tensor(name) for name in result.added]
    shards[-1][1].extend(added)
    return MergePlan(
        output=output,
        source=source,
        adapter=adapter,
        shards=shards,
        added=[item.spec for item in added],
        replaced=[name for name in placed.whole if name in backbone.shapes],
        embeddings=embeddings,
        companions=merged_companions(output, adapter, embeddings),
    )


@dataclass(frozen=True)
class _Result:
    """What the tensors of the result are made of; ``dtype`` as in :func:`make_merge_plan`."""

    parts: Parts
    placed: Placed
    embeddings: Embeddings
    dtype: str | None

    @property
    def added(self) -> list[str]:
        """The names of the tensors that the backbone lacks."""
        shapes, dropped = self.parts.backbone.shapes, self.embeddings.dropped
        new = [name for name in self.placed.whole if name not in shapes and name not in dropped]
        return list(dict.fromkeys((*new, *self.embeddings.added)))

    def whole(self, name: str) -> Copied | Merged | Stacked:
        """How the tensor ``name``, which may be a stack, comes about."""
        members = self.parts.backbone.stacks.get(name)
        if members is None:
            return self.tensor(name)
        items = [self.tensor(member) for member in members]
        cut = self.parts.backbone.matrices[members[0]].matrix.cut
        shape = items[0].spec.shape
        turned = cut is not None and cut.transposed
        sides = shape[::-1] if turned else shape
        spec = TensorSpec(name, items[0].spec.dtype, (len(items), *sides))
        return Stacked(spec, items, turned)

    def tensor(self, name: str) -> Copied | Merged:
        """How the tensor ``name`` comes about."""
        backbone = self.parts.backbone
        weight = self._weight(name)
        if (copied := weight.copied) is not None:
            return Copied(TensorSpec(name, copied.dtype, copied.shape), copied.file, copied.tensor)
        known = name if name in backbone.shapes else self.parts.vocabulary.inputs[0]
        pair = weight.pair
        turned = pair is not None and (pair.embedding or backbone.kinds[known] == "conv1d")
        spec = TensorSpec(name, self.dtype or backbone.base(known).dtype, weight.shape)
        return Merged(spec, weight, turned)

    def _weight(self, name: str) -> Weight:
        if name in self.embeddings.weights:
            return self.embeddings.weights[name]
        if name in self.placed.whole:
            return as_it_is(self.parts.file, self.placed.whole[name])
        return self.parts.backbone.weight(name, self.placed.pairs.get(name))


def _names(backbone: Backbone, adapter: TrainedAdapter) -> tuple[Names, Vocabulary]:
    """How the adapter names what the backbone's files hold, and what of that has an entry per
    token. transformers is asked if the manifest does not say all, and about embeddings if the
    adapter holds more than pairs."""
    known: Mapping[str, str] = recorded(backbone.output)
    names = match_names(adapter, backbone.shapes, known)
    places = places_all(adapter, {**backbone.stored, **backbone.shapes}, names)
    if places and not (adapter.whole or adapter.frozen or adapter.tokens):
        return names, vocabulary_of(backbone, None)
    config = {k: v for k, v in backbone.config.items() if k != "quantization_config"}
    if not places:
        known = {**anatomy(config, backbone.shapes, shortcut=False).names, **known}
        names = match_names(adapter, backbone.shapes, known)
    tables = token_tables(config)
    on_disk = Names(in_memory=known).of_backbone
    return names, vocabulary_of(backbone, tables and tables.renamed(on_disk))


def _in_order(shard: Shard, backbone: Backbone) -> list[str]:
    """The names of what a shard holds: of a matrix, which has several parts, once, and of a stack,
    which has several matrices."""
    names = (backbone.parts.get(tensor.name, tensor.name) for tensor in shard.header.tensors)
    stacks = {name: stack for stack, members in backbone.stacks.items() for name in members}
    return list(dict.fromkeys(stacks.get(name, name) for name in names))
