"""The input and output embedding of a merged model: trained in full, by rows, with a pair; resized;
tied or not. What comes out is what the trained model computes with, or a refusal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from loftq_cli.checkpoint.dtypes import FLOATS
from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.errors import InputError, UnsupportedInputError
from loftq_cli.families.architecture import FINAL_BIAS, is_embedding
from loftq_cli.layouts.trained import SAVE_BOTH, Pair, TrainedAdapter
from loftq_cli.merging.backbone import Backbone, Place, Weight
from loftq_cli.merging.match import OTHER, Placed
from loftq_cli.merging.vocabulary import Vocabulary, same_bytes


@dataclass(frozen=True)
class Embeddings:
    """``weights``: what becomes of embeddings, and of what is as long as they are, by name;
    ``added``: those of these names that the backbone lacks; ``dropped``: names of the adapter's
    whole tensors that the result does not need. ``rows`` of the input embedding, ``was`` before.
    ``untied``: the result has two embeddings if the backbone had one."""

    weights: Mapping[str, Weight] = field(default_factory=dict)
    added: Sequence[str] = ()
    dropped: Collection[str] = ()
    rows: int | None = None
    was: int | None = None
    untied: bool = False

    @property
    def resized(self) -> bool:
        return self.rows != self.was


@dataclass(frozen=True)
class Parts:
    """What is merged: a backbone, an adapter, where its tensors belong, and which have an entry per
    token."""

    backbone: Backbone
    adapter: TrainedAdapter
    placed: Placed
    vocabulary: Vocabulary

    @property
    def file(self) -> Path:
        """The adapter's."""
        return self.adapter.file


def settle_embeddings(parts: Parts) -> Embeddings:
    """What becomes of the embeddings of the backbone.

    Raises InputError if the adapter lacks a part of an embedding that was resized, or was trained
    on another backbone; UnsupportedInputError if one of several embeddings that are tied was
    trained alone, and the other is not in the adapter.
    """
    backbone, adapter, placed = parts.backbone, parts.adapter, parts.placed
    vocabulary = parts.vocabulary
    _refuse_other_backbone(parts)
    if not vocabulary.inputs:
        return Embeddings()
    touched = [name for name in vocabulary.inputs if placed.touches(name)]
    source = (touched or list(vocabulary.inputs))[0]
    head = _head(parts)
    was = backbone.shapes[source][0]
    if not touched and (head is None or not placed.touches(head)):
        return Embeddings(rows=was, was=was)
    weights = {
        name: _weight(name, (source, head), parts) for name in (source, head) if name is not None
    }
    rows = weights[source].shape[0]
    if head is not None:
        _refuse_two_lengths(adapter, source, head, weights)
    untied = vocabulary.tied and _is_untied(source, head, weights, parts)
    if vocabulary.tied and not untied and head is not None:
        del weights[head]
        if head in backbone.shapes:
            weights[head] = weights[source]
    for name in vocabulary.inputs:
        if name != source and placed.touches(name):
            weights[name] = _weight(name, (name, None), parts)
        elif name != source and _same(backbone.weight(name), backbone.weight(source), adapter):
            weights[name] = weights[source]  # another copy of it
    dropped = _others(source, weights, parts)
    if rows != was:
        weights |= _rest(rows, parts)
    if untied and head is not None:
        weights |= _bias_of_its_own(head, parts)
    added = [name for name in weights if name not in backbone.shapes]
    return Embeddings(weights, added, dropped, rows, was, untied)


def _head(parts: Parts) -> str | None:
    """The output embedding, None if it is the input's, and the adapter has nothing for it."""
    if parts.vocabulary.outputs:
        return parts.vocabulary.outputs[0]
    names = (*parts.placed.whole, *parts.placed.pairs, *parts.placed.frozen, *parts.placed.tokens)
    return next(filter(parts.vocabulary.is_absent_head, names), None)


def _weight(name: str, both: tuple[str, str | None], parts: Parts) -> Weight:
    """What the trained model has as the embedding ``name``."""
    own = parts.backbone.weight(name if name in parts.backbone.shapes else both[0])
    base = own
    # What tied embeddings had before training is one tensor.
    shared = both if parts.vocabulary.tied else (name,)
    frozen = next(
        (parts.placed.frozen[n] for n in (name, *shared) if n in parts.placed.frozen), None
    )
    if name in parts.placed.whole:
        base = Weight(
            (parts.adapter.file, parts.placed.whole[name]), parts.placed.whole[name].shape
        )
    elif frozen is not None and _is_table(frozen) and frozen.shape != own.shape:
        base = Weight((parts.adapter.file, frozen), frozen.shape)
    result = replace(base, pair=parts.placed.pairs.get(name), tokens=parts.placed.tokens.get(name))
    needed, of = base.shape[0], ""
    if result.pair is not None:
        needed, of = result.pair.shape[0], result.pair.lora_A.name
    elif result.tokens is not None:
        needed = max(needed, *(index + 1 for index in result.tokens.indices))
        of = result.tokens.values.name
    if needed != base.shape[0]:
        raise InputError(
            f"{parts.file}: tensor {of!r} is for {needed} tokens, {name!r} has {base.shape[0]}, "
            "and the embedding that was resized is not in the adapter",
            hint=SAVE_BOTH,
        )
    return result


def _refuse_two_lengths(
    adapter: TrainedAdapter, source: str, head: str, weights: Mapping[str, Weight]
) -> None:
    first, second = (weights[name].shape[0] for name in (source, head))
    if first != second:
        raise InputError(
            f"{adapter.file}: with this adapter {source!r} has {first} rows and {head!r} {second}: "
            "the adapter does not hold both embeddings that were resized",
            hint=SAVE_BOTH,
        )


def _is_untied(source: str, head: str | None, weights: Mapping[str, Weight], parts: Parts) -> bool:
    """Whether training has made two of the one embedding of a tied model."""
    if head is None or not parts.placed.touches(head):
        if source not in parts.placed.whole and source not in parts.placed.pairs:
            return False  # nothing, or rows, which PEFT trains for both
        if head is None:
            tensor = parts.placed.whole.get(source) or parts.placed.pairs[source].lora_A
            raise UnsupportedInputError(
                f"{parts.file}: tensor {tensor.name!r}: the model ties its input and output "
                "embeddings, and this one was trained alone, without the other in the adapter",
                hint="train with ensure_weight_tying=True, or save with save_embedding_layers=True",
            )
    return not _same(weights[source], weights[head], parts.adapter)


def _same(first: Weight, second: Weight, adapter: TrainedAdapter) -> bool:
    """Whether two embeddings of a model are one."""
    if first.base != second.base:
        places = [_place(weight.base) for weight in (first, second)]
        if places[0] is None or places[1] is None or not same_bytes(places[0], places[1]):
            return False
    if (first.pair is None, first.tokens is None) != (second.pair is None, second.tokens is None):
        return False
    if first.tokens and second.tokens:
        rows = [(adapter.file, weight.values) for weight in (first.tokens, second.tokens)]
        if list(first.tokens.indices) != list(second.tokens.indices) or not same_bytes(*rows):
            return False
    if first.pair and second.pair:
        with TensorFile(adapter.file) as file:
            return torch.equal(_product(file, first.pair), _product(file, second.pair))
    return True


def _is_table(tensor: StoredTensor) -> bool:
    """Whether this is no packed weight."""
    return len(tensor.shape) == 2 and tensor.dtype in FLOATS


def _place(base: tuple[object, object]) -> Place | None:
    return base if isinstance(base[1], StoredTensor) else None  # type: ignore[return-value]


def _product(file: TensorFile, pair: Pair) -> torch.Tensor:
    """The factors of a pair, (rank, dim) and (rank, tokens) whichever kind it is, in one."""
    lora_A, lora_B = file.read(pair.lora_A), file.read(pair.lora_B)
    parts = (lora_B.T, lora_A) if pair.embedding else (lora_A, lora_B.T)
    return torch.cat([part.float() * factor for part, factor in zip(parts, (1, pair.scaling))], 1)


def _others(source: str, weights: Mapping[str, Weight], parts: Parts) -> list[str]:
    """The whole embeddings in the adapter that have no place of their own in the backbone, because
    they are its ``source``, or the output embedding that is tied to it. Raises
    UnsupportedInputError for one that is another by now."""
    dropped = []
    for name, tensor in parts.placed.whole.items():
        is_table = is_embedding(name) or parts.vocabulary.has(name)
        if name in weights or name in parts.backbone.shapes or not is_table:
            continue
        if not parts.vocabulary.tied and not source.endswith("shared.weight"):
            continue  # one of its own
        place = _place(weights[source].base)
        if place is None or not (
            parts.vocabulary.has(name) or same_bytes(place, (parts.adapter.file, tensor))
        ):
            raise UnsupportedInputError(
                f"{parts.file}: tensor {tensor.name!r}: in the backbone one tensor stands for "
                f"this and for {source!r}, trained apart they cannot be merged",
                hint="train with ensure_weight_tying=True",
            )
        dropped.append(name)
    return dropped


def _rest(rows: int, parts: Parts) -> dict[str, Weight]:
    """What else is as long as the vocabulary, for ``rows`` tokens."""
    weights = {}
    for name, shape in parts.backbone.shapes.items():
        if FINAL_BIAS.search(name) and shape[-1:] == parts.vocabulary.shape[:1]:
            weights[name] = Weight(parts.backbone.stored[name], (*shape[:-1], rows))
    found = [
        parts.placed.whole[name] for name in parts.vocabulary.biases if name in parts.placed.whole
    ]
    for name in parts.vocabulary.biases:
        tensor = parts.placed.whole.get(name, *found[:1]) if found else None
        if tensor is not None:  # stored under two names, it is one
            weights[name] = Weight((parts.adapter.file, tensor), tensor.shape)
        if tensor is None or tensor.shape != (rows,):
            raise InputError(
                f"{parts.file}: the embeddings were resized to {rows} tokens, and {name!r} of "
                "that length is not in the adapter",
                hint=SAVE_BOTH,
            )
    return weights


def _bias_of_its_own(head: str, parts: Parts) -> dict[str, Weight]:
    """The bias of ``head`` under the name beside it: transformers ties that to another name only
    if it ties the embeddings."""
    own = f"{head.removesuffix('weight')}bias"
    vocabulary = parts.vocabulary
    if own in parts.backbone.shapes or not vocabulary.biases or not vocabulary.is_bias(own):
        return {}
    tensor = parts.placed.whole.get(parts.vocabulary.biases[0])
    if tensor is None:
        return {own: parts.backbone.weight(parts.vocabulary.biases[0])}
    return {own: Weight((parts.adapter.file, tensor), tensor.shape)}


def _refuse_other_backbone(parts: Parts) -> None:
    """Raise InputError if a frozen tensor is not, in its dtype and as far as both go, the one of
    the backbone."""
    for name, tensor in parts.placed.frozen.items():
        stored = parts.backbone.stored
        path, ours = stored[name if name in stored else parts.vocabulary.inputs[0]]
        with TensorFile(path) as file, TensorFile(parts.adapter.file) as trained:
            theirs, own = trained.read(tensor), file.read(ours)
        if parts.vocabulary.has(name) and _is_table(tensor):
            common = min(len(theirs), len(own))
            theirs, own = theirs[:common], own[:common]
        if not torch.equal(own.to(theirs.dtype), theirs):
            raise InputError(
                f"{parts.file}: tensor {tensor.name!r} is not the one of {path}", hint=OTHER
            )
