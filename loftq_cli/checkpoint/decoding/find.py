"""A source that is quantized itself, with the tensors that it means in the place of its codes.

What a format here can read is decoded matrix by matrix when it is read, to the values that
transformers computes with; whatever else is quantized stays as it is, to be refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.decoding import bnb, fp8, gptq, int8, mxfp4, packed
from loftq_cli.checkpoint.decoding.parts import Model
from loftq_cli.checkpoint.dtypes import tag_named, tag_of
from loftq_cli.checkpoint.encoded import EncodedTensor, Part
from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.checkpoint.quantized import KEYS, stated
from loftq_cli.checkpoint.reader import read_tensor
from loftq_cli.checkpoint.source import Shard, Source
from loftq_cli.errors import CorruptFileError

_FORMATS = (fp8, mxfp4, packed, bnb, int8, gptq)
_DEFAULT = "BF16"


@dataclass(frozen=True)
class _Found:
    tensors: Mapping[str, EncodedTensor]
    """By the name of the part with the codes."""
    taken: frozenset[str]
    """The names of all stored tensors that these are made of."""
    formats: tuple[str, ...]


def decoded(source: Source) -> Source:
    """``source`` as what it means; itself if there is nothing to decode. Raises
    UnsupportedInputError for a form of a known format that is not read, and CorruptFileError for
    parts that are missing or do not fit together."""
    parts = {
        tensor.name: Part(shard.name, shard.path, tensor)
        for shard in source.shards
        for tensor in shard.header.tensors
    }
    entries = [value for _, value in stated(source.config.content) if isinstance(value, Mapping)]
    entry = entries[0] if entries else {}
    found = _find(Model(parts, entry, _dtype(source.config.content), _reader(source)))
    if not found.tensors:
        return source
    shards = tuple(_with(shard, found) for shard in source.shards)
    config = replace(source.config, content=_without(source.config.content))
    return replace(source, shards=shards, config=config, encoded=found.formats)


def decoded_alone(
    tensors: Mapping[str, torch.Tensor], stated: Mapping[str, Any], dtype: str
) -> torch.Tensor:
    """What the stored ``tensors`` of one matrix mean, by ``names`` and ``stated`` of the
    :class:`EncodedTensor` that they were, in the dtype of that tag. Raises CorruptFileError if they
    make no sense."""
    parts = {
        name: Part("", Path(), StoredTensor(name, tag_of(each.dtype), tuple(each.shape), 0))
        for name, each in tensors.items()
    }
    found = _find(Model(parts, stated, dtype, lambda part: tensors[part.tensor.name]))
    if len(found.tensors) != 1:
        raise CorruptFileError(f"{', '.join(tensors)}: not the parts of one matrix")
    (encoded,) = found.tensors.values()
    others = {key: tensors[part.tensor.name] for key, part in encoded.others.items()}
    return encoded.decode(tensors[encoded.main.tensor.name], others)


def _find(model: Model) -> _Found:
    tensors: dict[str, EncodedTensor] = {}
    taken: set[str] = set()
    formats = []
    for form in _FORMATS:
        for tensor, names in form.find(model):
            tensors[tensor.main.tensor.name] = tensor
            taken |= names
            formats += [form.NAME] if form.NAME not in formats else []
    return _Found(tensors, frozenset(taken), tuple(formats))


def _with(shard: Shard, found: _Found) -> Shard:
    tensors: list[StoredTensor] = []
    for tensor in shard.header.tensors:
        if tensor.name in found.tensors:
            tensors.append(found.tensors[tensor.name])
        elif tensor.name not in found.taken:
            tensors.append(tensor)
    return replace(shard, header=replace(shard.header, tensors=tuple(tensors)))


def _reader(source: Source) -> Callable[[Part], torch.Tensor]:
    """Reads a small part now; its shard is brought if it is not there."""

    def read(part: Part) -> torch.Tensor:
        source.supply.ensure(part.shard)
        return read_tensor(part.path, part.tensor)

    return read


def _dtype(config: Mapping[str, Any]) -> str:
    """The tag of what the model computes in, as config.json says at the top or of its text."""
    inner = [value for key, value in config.items() if key.endswith("_config")]
    for part in (config, *(each for each in inner if isinstance(each, Mapping))):
        named = part.get("dtype", part.get("torch_dtype"))
        if isinstance(named, str) and named in ("float32", "float16", "bfloat16"):
            return tag_named(named)
    return _DEFAULT


def _without(value: Any) -> Any:
    """A config without what it says of quantization, at any depth."""
    if isinstance(value, Mapping):
        return {key: _without(item) for key, item in value.items() if key not in KEYS}
    return [_without(item) for item in value] if isinstance(value, list) else value
