"""Which tensor of a backbone is which of the model that it was made from, and whether it was made
from that model at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from loftq_cli.checkpoint.dtypes import FLOATS
from loftq_cli.checkpoint.header import StoredTensor, TensorSpec
from loftq_cli.checkpoint.reader import read_tensor
from loftq_cli.checkpoint.source import Shard, Source
from loftq_cli.errors import InputError
from loftq_cli.families.architecture import EMBEDDING, kind_of
from loftq_cli.families.blocks import is_in_block
from loftq_cli.planning.given import Given

_FUSED = re.compile(r"(?:qkv|gate_up|query_key_value|in_proj|c_attn|kv_proj)", re.IGNORECASE)
_ROWS = 512
"""Of an embedding that are compared."""
ROUNDING = 2**-7
"""The most that two roundings to 16 bits differ by, relative to the value."""


def paired(
    source: Source,
    given: Given,
    names: Mapping[str, str],
    theirs: Mapping[str, str],
) -> dict[str, TensorSpec]:
    """The tensors of ``given`` by the name that each has in ``source``. Names that differ on disk
    are compared as ``names`` of the source's and ``theirs`` say that they are in memory.

    Raises InputError with every matrix that has no counterpart, or one of another shape.
    """
    known = {theirs.get(tensor.name, tensor.name): tensor for tensor in given.tensors}
    found: dict[str, TensorSpec] = {}
    faults = []
    for tensor in source.tensors:
        other = known.pop(names.get(tensor.name, tensor.name), None)
        if other is None:
            if _is_matrix(tensor):
                faults.append(f"{tensor.name} is not in the backbone")
        elif not given.is_quantized(other) and _is_matrix(tensor) and other.dtype not in FLOATS:
            faults.append(f"{other.name} is {other.dtype} in the backbone, without what decodes it")
        elif _fits(tensor, other, source):
            found[tensor.name] = other
        elif _is_matrix(tensor) or given.is_quantized(other):
            shapes = f"{list(tensor.shape)}, in the backbone {list(other.shape)}"
            faults.append(f"{tensor.name} is {shapes}")
    left = [each for each in known.values() if given.is_quantized(each) or _is_matrix(each)]
    faults += [f"{each.name} is not in the source" for each in left]
    if faults:
        count = "1 tensor" if len(faults) == 1 else f"{len(faults)} tensors"
        raise InputError(
            f"{given.id} and {source.id} do not pair up, {count}: {'; '.join(faults)}",
            hint=_hint(faults),
        )
    return found


def check_same_model(shard: Shard, tensor: StoredTensor, given: Given) -> None:
    """Raise InputError if ``tensor`` of the source's ``shard`` is an embedding that ``given`` holds
    in floating point, too, and another: who quantizes the blocks changes none."""
    place = given.stored.get(tensor.name) if EMBEDDING.search(tensor.name) else None
    if place is None or tensor.dtype not in FLOATS or place[1].dtype not in FLOATS:
        return
    path, stored = place
    if not tensor.shape or tensor.shape[1:] != stored.shape[1:] or not tensor.elements:
        return
    rows = min(_ROWS, tensor.shape[0], stored.shape[0])
    ours, held = _rows(shard.path, tensor, rows), _rows(path, stored, rows)
    largest = torch.maximum(ours.abs(), held.abs())
    if bool(((ours - held).abs() <= ROUNDING * largest).all()):
        return
    raise InputError(
        f"{path}: tensor {tensor.name!r} is not that of {shard.path}: the backbone was made from "
        "another model, or its weights were rotated first",
        hint="give the model that the backbone was made from",
    )


def _rows(path: Path, tensor: StoredTensor, rows: int) -> torch.Tensor:
    """The first ``rows``, float32."""
    return read_tensor(path, replace(tensor, shape=(rows, *tensor.shape[1:]))).float()


def _fits(tensor: TensorSpec, other: TensorSpec, source: Source) -> bool:
    """A transposed linear layer is stored as an ordinary one by libraries that quantize."""
    turned = kind_of(tensor.name, source.config.content) == "conv1d"
    return other.shape == tensor.shape or (turned and other.shape == tensor.shape[::-1])


def _is_matrix(tensor: TensorSpec) -> bool:
    named = tensor.name.endswith(".weight") and len(tensor.shape) == 2
    return named and is_in_block(tensor.name)


def _hint(faults: Iterable[str]) -> str:
    asked = "give the model that the backbone was made from"
    if any(map(_FUSED.search, faults)):
        return f"{asked}, saved as the backbone was: a layer is fused on one side only"
    return asked
