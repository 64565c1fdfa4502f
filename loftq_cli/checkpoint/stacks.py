"""Matrices that a checkpoint holds in one tensor, (count, rows, columns): one for each expert."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from loftq_cli.checkpoint.dtypes import FLOATS
from loftq_cli.checkpoint.encoded import EncodedTensor, Part
from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.checkpoint.source import Shard, Source

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Stack:
    """The tensor ``tensor``; matrix 3 of ``count`` is called ``<module>.3.<parameter>.weight``.
    ``transposed``: it holds (count, in, out) instead of (count, out, in)."""

    tensor: str
    module: str
    parameter: str
    count: int
    transposed: bool

    def name(self, index: int) -> str:
        """Of a matrix."""
        return f"{self.module}.{index}.{self.parameter}.weight"

    def cuts(self) -> dict[str, Cut]:
        """Its matrices, by name."""
        return {
            self.name(index): Cut(self.tensor, index, self.transposed)
            for index in range(self.count)
        }


@dataclass(frozen=True)
class Cut:
    """Which matrix of which tensor this is; ``transposed`` as in Stack."""

    tensor: str
    index: int
    transposed: bool


def cut(source: Source, stacks: Mapping[str, Stack]) -> Source:
    """``source`` with the matrices (out, in) of the ``stacks``, by tensor, in their place."""
    shards = tuple(_cut(shard, stacks) for shard in source.shards)
    return replace(source, shards=shards)


def _cut(shard: Shard, stacks: Mapping[str, Stack]) -> Shard:
    tensors: list[StoredTensor] = []
    for tensor in shard.header.tensors:
        stack = stacks.get(tensor.name)
        if stack is None or tensor.dtype not in FLOATS:
            tensors.append(tensor)
        else:
            tensors += _matrices(shard, tensor, stack)
    return replace(shard, header=replace(shard.header, tensors=tuple(tensors)))


def _matrices(shard: Shard, tensor: StoredTensor, stack: Stack) -> Iterable[StoredTensor]:
    for index in range(stack.count):
        name = stack.name(index)
        if isinstance(tensor, EncodedTensor):
            yield _piece(tensor, stack, index)
        elif stack.transposed:
            main = Part(shard.name, shard.path, tensor)
            held = EncodedTensor.of(tensor.name, tensor.dtype, tensor.shape, main, {}, _as_it_is)
            yield _piece(held, stack, index)
        else:
            one = _slice(tensor, index)
            yield replace(one, name=name, shape=one.shape[1:])


def _piece(tensor: EncodedTensor, stack: Stack, index: int) -> EncodedTensor:
    """Each part's own piece, decoded as if there were one matrix."""
    rows, columns = tensor.shape[1:]
    main = replace(tensor.main, tensor=_slice(tensor.main.tensor, index))
    others = {
        key: replace(part, tensor=_slice(part.tensor, index)) for key, part in tensor.others.items()
    }
    decode = partial(_first, decode=tensor.decode, transposed=stack.transposed)
    shape = (columns, rows) if stack.transposed else (rows, columns)
    name = stack.name(index)
    return EncodedTensor.of(name, tensor.dtype, shape, main, others, decode)


def _slice(tensor: StoredTensor, index: int) -> StoredTensor:
    """The piece (1, …) of a tensor (count, …)."""
    each = tensor.nbytes // tensor.shape[0]
    return replace(tensor, shape=(1, *tensor.shape[1:]), start=tensor.start + index * each)


def _as_it_is(values: torch.Tensor, others: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return values


def _first(
    codes: torch.Tensor,
    others: Mapping[str, torch.Tensor],
    *,
    decode: Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor],
    transposed: bool,
) -> torch.Tensor:
    matrix = decode(codes, others)[0]
    return matrix.T.contiguous() if transposed else matrix
