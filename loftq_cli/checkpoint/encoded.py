"""A tensor that a checkpoint holds in codes, under the name, dtype and shape that it means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.header import StoredTensor

if TYPE_CHECKING:
    import torch

    from loftq_cli.checkpoint.source import Shard


@dataclass(frozen=True)
class Part:
    """A stored tensor of a shard."""

    shard: str
    path: Path
    tensor: StoredTensor


@dataclass(frozen=True)
class EncodedTensor(StoredTensor):
    """``start`` is that of ``main``, the part with the codes; ``others`` by what they are to it,
    perhaps in other shards. ``decode`` makes the tensor of all parts' values, and raises
    CorruptFileError if these make no sense. ``stated``: what config.json has to say for it to be
    found again among ``names``; ``beside``: the stored tensors that its finding alone has read."""

    main: Part
    others: Mapping[str, Part] = field(hash=False)
    decode: Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor] = field(
        compare=False, repr=False
    )
    stated: Mapping[str, Any] = field(default_factory=dict, hash=False)
    beside: tuple[str, ...] = ()

    @staticmethod
    def of(
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        main: Part,
        others: Mapping[str, Part],
        decode: Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor],
        stated: Mapping[str, Any] | None = None,
        beside: tuple[str, ...] = (),
    ) -> EncodedTensor:
        """The tensor whose codes are ``main``."""
        start = main.tensor.start
        return EncodedTensor(name, dtype, shape, start, main, others, decode, stated or {}, beside)

    @property
    def names(self) -> tuple[str, ...]:
        """The stored tensors that it takes up."""
        others = (part.tensor.name for part in self.others.values())
        return (self.main.tensor.name, *self.beside, *others)


def foreign(shard: Shard) -> set[str]:
    """The other shards that parts of the tensors of ``shard`` are in."""
    encoded = (each for each in shard.header.tensors if isinstance(each, EncodedTensor))
    return {part.shard for each in encoded for part in each.others.values()} - {shard.name}


def length_in_file(tensor: StoredTensor) -> int:
    """The bytes that ``tensor`` takes from its ``start`` on in its file."""
    return tensor.main.tensor.nbytes if isinstance(tensor, EncodedTensor) else tensor.nbytes
