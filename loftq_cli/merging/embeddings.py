"""The input and output embedding of a merged model: trained in full, by rows, with a pair; resized;
tied or not. The result is what the trained model computes with, or a refusal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from loftq_cli.checkpoint.dtypes import FLOATS
from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.errors import InputError, UnsupportedInputError
from loftq_cli.families.architecture import FINAL_BIAS, is_embedding, is_shared_by_stacks
from loftq_cli.layouts.trained import SAVE_BOTH
from loftq_cli.merging.backbone import InFile, Weight, as_it_is
from loftq_cli.merging.match import OTHER, Parts, Placed
from loftq_cli.merging.same import same_bytes, same_weights


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


def settle_embeddings(parts: Parts, placed: Placed) -> Embeddings:
    """What becomes of the embeddings of the backbone.

    Raises InputError if the adapter lacks a part of an embedding that was resized, or was trained
    on another backbone; UnsupportedInputError if one of several embeddings that are tied was
    trained alone, and the other is not in the adapter.
    """
    settling = _Settling(parts, placed)
    settling.refuse_other_backbone()
    if not parts.vocabulary.inputs:
        return Embeddings()
    was = parts.backbone.shapes[settling.source][0]
    if not any(map(placed.touches, (*parts.vocabulary.inputs, *settling.heads))):
        return Embeddings(rows=was, was=was)
    return settling.settled(was)


class _Settling:
    """The embeddings of what is merged, as the adapter's ``placed`` tensors make them."""

    def __init__(self, parts: Parts, placed: Placed) -> None:
        self.backbone, self.vocabulary = parts.backbone, parts.vocabulary
        self.adapter, self.file = parts.adapter, parts.file
        self.placed = placed

    @cached_property
    def source(self) -> str:
        """The input embedding, of several one that the adapter has something for."""
        inputs = self.vocabulary.inputs
        return next(filter(self.placed.touches, inputs), inputs[0])

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """The output embedding; none if it is the input's, and the adapter has nothing for it."""
        if self.vocabulary.outputs:
            return (self.vocabulary.outputs[0],)
        placed = self.placed
        names = (*placed.whole, *placed.pairs, *placed.frozen, *placed.tokens)
        return tuple(filter(self.vocabulary.is_absent_head, names))[:1]

    def settled(self, was: int) -> Embeddings:
        """What becomes of embeddings of which the adapter has a part."""
        weights = {name: self._weight(name) for name in (self.source, *self.heads)}
        rows = weights[self.source].shape[0]
        self._refuse_two_lengths(weights)
        untied = self.vocabulary.tied and self._is_untied(weights)
        if self.vocabulary.tied and not untied:
            for head in self.heads:
                del weights[head]
                if head in self.backbone.shapes:
                    weights[head] = weights[self.source]
        weights |= self._other_inputs(weights[self.source])
        dropped = self._dropped(weights)
        if rows != was:
            weights |= self._rest(rows)
        if untied:
            weights |= self._bias_of_its_own(*self.heads)
        added = [name for name in weights if name not in self.backbone.shapes]
        return Embeddings(weights, added, dropped, rows, was, untied)

    def _weight(self, name: str) -> Weight:
        """What the trained model has as the embedding ``name``."""
        both = (self.source, *self.heads)
        base = own = self.backbone.weight(name if name in self.backbone.shapes else self.source)
        # What tied embeddings had before training is one tensor.
        shared = both if self.vocabulary.tied and name in both else ()
        frozen = self.placed.frozen
        before = next((frozen[n] for n in (name, *shared) if n in frozen), None)
        if name in self.placed.whole:
            base = as_it_is(self.file, self.placed.whole[name])
        elif before is not None and _is_table(before) and before.shape != own.shape:
            base = as_it_is(self.file, before)
        pair, tokens = self.placed.pairs.get(name), self.placed.tokens.get(name)
        needed, of = base.shape[0], ""
        if pair is not None:
            needed, of = pair.shape[0], pair.lora_A.name
        elif tokens is not None:
            needed = max(needed, *(index + 1 for index in tokens.indices))
            of = tokens.values.name
        if needed != base.shape[0]:
            raise InputError(
                f"{self.file}: tensor {of!r} is for {needed} tokens, {name!r} has {base.shape[0]}, "
                "and the embedding that was resized is not in the adapter",
                hint=SAVE_BOTH,
            )
        return replace(base, pair=pair, tokens=tokens)

    def _refuse_two_lengths(self, weights: Mapping[str, Weight]) -> None:
        first = weights[self.source].shape[0]
        for head in self.heads:
            second = weights[head].shape[0]
            if first != second:
                raise InputError(
                    f"{self.file}: with this adapter {self.source!r} has {first} rows and "
                    f"{head!r} {second}: the adapter does not hold both embeddings that were "
                    "resized",
                    hint=SAVE_BOTH,
                )

    def _is_untied(self, weights: Mapping[str, Weight]) -> bool:
        """Whether training has made two of the one embedding of a tied model."""
        whole, pairs = self.placed.whole, self.placed.pairs
        if not any(map(self.placed.touches, self.heads)):
            if self.source not in whole and self.source not in pairs:
                return False  # nothing, or rows, which PEFT trains for both
            if not self.heads:
                tensor = whole.get(self.source) or pairs[self.source].lora_A
                raise UnsupportedInputError(
                    f"{self.file}: tensor {tensor.name!r}: the model ties its input and output "
                    "embeddings, and this one was trained alone, without the other in the adapter",
                    hint="train with ensure_weight_tying=True, or save with "
                    "save_embedding_layers=True",
                )
        return not all(
            same_weights(weights[self.source], weights[head], self.adapter) for head in self.heads
        )

    def _other_inputs(self, settled: Weight) -> dict[str, Weight]:
        """What becomes of input embeddings other than the source, which is ``settled``."""
        weights = {}
        before = self.backbone.weight(self.source)
        for name in self.vocabulary.inputs:
            if name == self.source:
                continue
            if self.placed.touches(name):
                weights[name] = self._weight(name)
            elif same_weights(self.backbone.weight(name), before, self.adapter):
                weights[name] = settled  # another copy of it
        return weights

    def _dropped(self, weights: Mapping[str, Weight]) -> list[str]:
        """The whole embeddings in the adapter that have no place of their own in the backbone,
        because they are its source, or the output embedding that is tied to it. Raises
        UnsupportedInputError for one that is another by now."""
        dropped = []
        for name, tensor in self.placed.whole.items():
            is_table = is_embedding(name) or self.vocabulary.has(name)
            if name in weights or name in self.backbone.shapes or not is_table:
                continue
            if not self.vocabulary.tied and not is_shared_by_stacks(self.source):
                continue  # one of its own
            held = weights[self.source].base.in_file
            if held is None or not (
                self.vocabulary.has(name) or same_bytes(held, InFile(self.file, tensor))
            ):
                raise UnsupportedInputError(
                    f"{self.file}: tensor {tensor.name!r}: in the backbone one tensor stands for "
                    f"this and for {self.source!r}, trained apart they cannot be merged",
                    hint="train with ensure_weight_tying=True",
                )
            dropped.append(name)
        return dropped

    def _rest(self, rows: int) -> dict[str, Weight]:
        """What else is as long as the vocabulary, for ``rows`` tokens."""
        weights = {}
        for name, shape in self.backbone.shapes.items():
            if FINAL_BIAS.search(name) and shape[-1:] == self.vocabulary.shape[:1]:
                weights[name] = Weight(self.backbone.base(name), (*shape[:-1], rows))
        whole = self.placed.whole
        found = [whole[name] for name in self.vocabulary.biases if name in whole]
        for name in self.vocabulary.biases:
            tensor = whole.get(name, *found[:1]) if found else None
            if tensor is not None:  # stored under two names, it is one
                weights[name] = as_it_is(self.file, tensor)
            if tensor is None or tensor.shape != (rows,):
                raise InputError(
                    f"{self.file}: the embeddings were resized to {rows} tokens, and {name!r} of "
                    "that length is not in the adapter",
                    hint=SAVE_BOTH,
                )
        return weights

    def _bias_of_its_own(self, head: str) -> dict[str, Weight]:
        """The bias of ``head`` under the name beside it: transformers ties that to another name
        only if it ties the embeddings."""
        own = f"{head.removesuffix('weight')}bias"
        biases = self.vocabulary.biases
        if own in self.backbone.shapes or not biases or not self.vocabulary.is_bias(own):
            return {}
        tensor = self.placed.whole.get(biases[0])
        return {
            own: self.backbone.weight(biases[0]) if tensor is None else as_it_is(self.file, tensor)
        }

    def refuse_other_backbone(self) -> None:
        """Raise InputError if a frozen tensor is not, in its dtype and as far as both go, the one
        of the backbone."""
        for name, tensor in self.placed.frozen.items():
            stored = self.backbone.stored
            path, ours = stored[name if name in stored else self.vocabulary.inputs[0]]
            with TensorFile(path) as file, TensorFile(self.file) as trained:
                theirs, own = trained.read(tensor), file.read(ours)
            if self.vocabulary.has(name) and _is_table(tensor):
                common = min(len(theirs), len(own))
                theirs, own = theirs[:common], own[:common]
            if not torch.equal(own.to(theirs.dtype), theirs):
                raise InputError(
                    f"{self.file}: tensor {tensor.name!r} is not the one of {path}", hint=OTHER
                )


def _is_table(tensor: StoredTensor) -> bool:
    """Whether this is no packed weight."""
    return len(tensor.shape) == 2 and tensor.dtype in FLOATS
