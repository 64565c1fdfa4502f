"""What a merge will write, settled before anything is computed: every tensor of the result, and
where its parts come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.checkpoint.header import StoredTensor, TensorSpec
from loftq_cli.checkpoint.output import Output
from loftq_cli.checkpoint.source import Shard, Source
from loftq_cli.checkpoint.stored import Stored
from loftq_cli.checkpoint.writer import place as place_in_file
from loftq_cli.families.anatomy import anatomy
from loftq_cli.families.token_tables import token_tables
from loftq_cli.layouts.trained import TrainedAdapter
from loftq_cli.loading.trained_beside import refuse_other_conversion
from loftq_cli.merging.backbone import Backbone, Weight, open_backbone
from loftq_cli.merging.embeddings import Embeddings, Parts, settle_embeddings
from loftq_cli.merging.match import place, refuse_incomplete
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
class MergePlan:
    """``shards``: (file name, tensors in order). ``added`` are the tensors that the backbone lacks,
    ``replaced`` the names of those that the adapter holds whole. ``companions``: the files that
    are copied along, by relative name."""

    output: Output
    backbone: Source
    adapter: TrainedAdapter
    stored: Stored
    shards: Sequence[tuple[str, Sequence[Copied | Merged]]]
    added: Sequence[TensorSpec]
    replaced: Sequence[str]
    embeddings: Embeddings
    companions: Mapping[str, Path]

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
    names, vocabulary = _names(backbone, adapter)
    placed = place(adapter, names, backbone, vocabulary)
    refuse_incomplete(adapter, names, backbone.matrices, placed)
    embeddings = settle_embeddings(Parts(backbone, adapter, placed, vocabulary))
    texts = merged_companions(output, adapter, embeddings)

    def settle(name: str) -> Copied | Merged:
        weight = embeddings.weights.get(name)
        if weight is None and name in placed.whole:
            return _copied(name, adapter.file, placed.whole[name])
        if weight is None:
            weight = backbone.weight(name, placed.pairs.get(name))
        if weight.copied is not None:
            return _copied(name, *weight.copied)
        known = name if name in backbone.shapes else vocabulary.inputs[0]
        pair = weight.pair
        turned = pair is not None and (pair.embedding or backbone.kinds[known] == "conv1d")
        spec = TensorSpec(name, dtype or backbone.dtype(known), weight.shape)
        return Merged(spec, weight, turned)

    shards = [
        (shard.name, [settle(name) for name in _in_order(shard, backbone)])
        for shard in source.shards
    ]
    new = [name for name in placed.whole if name not in backbone.shapes]
    new = [name for name in new if name not in embeddings.dropped]
    added = [settle(name) for name in dict.fromkeys((*new, *embeddings.added))]
    shards[-1][1].extend(added)
    return MergePlan(
        output=output,
        backbone=source,
        adapter=adapter,
        stored=backbone.stored,
        shards=shards,
        added=[item.spec for item in added],
        replaced=[name for name in placed.whole if name in backbone.shapes],
        embeddings=embeddings,
        companions=texts,
    )


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
    """The names of what a shard holds: of a matrix, which has several parts, once."""
    tensors = shard.header.tensors
    return list(dict.fromkeys(backbone.parts.get(t.name, t.name) for t in tensors))


def _copied(name: str, file: Path, tensor: StoredTensor) -> Copied:
    return Copied(TensorSpec(name, tensor.dtype, tensor.shape), file, tensor)
