"""Whether two tensors are one: in files, or once the parts of an adapter are added to them."""

from __future__ import annotations

import torch

from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.layouts.trained import TrainedAdapter
from loftq_cli.layouts.trained_parts import Pair
from loftq_cli.merging.backbone import InFile, Weight


def same_bytes(first: InFile, second: InFile) -> bool:
    """Whether two tensors in files are the same in dtype, shape and bytes."""
    ours, theirs = first.tensor, second.tensor
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    with TensorFile(first.file) as one, TensorFile(second.file) as two:
        return all(
            mine == yours for mine, yours in zip(one.pieces(ours), two.pieces(theirs), strict=True)
        )


def same_weights(first: Weight, second: Weight, adapter: TrainedAdapter) -> bool:
    """Whether two embeddings of a model are one, with their parts of ``adapter``."""
    if first.base != second.base:
        one, two = first.base.in_file, second.base.in_file
        if one is None or two is None or not same_bytes(one, two):
            return False
    if (first.pair is None, first.tokens is None) != (second.pair is None, second.tokens is None):
        return False
    if first.tokens and second.tokens:
        rows = [InFile(adapter.file, weight.values) for weight in (first.tokens, second.tokens)]
        if list(first.tokens.indices) != list(second.tokens.indices) or not same_bytes(*rows):
            return False
    if first.pair and second.pair:
        with TensorFile(adapter.file) as file:
            return torch.equal(_product(file, first.pair), _product(file, second.pair))
    return True


def _product(file: TensorFile, pair: Pair) -> torch.Tensor:
    """The factors of a pair, (rank, dim) and (rank, tokens) whichever kind it is, in one."""
    lora_A, lora_B = pair.read(file)
    parts = (lora_B.T, lora_A) if pair.embedding else (lora_A, lora_B.T)
    return torch.cat([part * factor for part, factor in zip(parts, (1, pair.scaling))], 1)
