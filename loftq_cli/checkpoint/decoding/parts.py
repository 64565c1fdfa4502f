"""What the formats have in common: looking parts up, and checking their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loftq_cli.checkpoint.encoded import Part
from loftq_cli.checkpoint.header import shown
from loftq_cli.errors import CorruptFileError

Parts = Mapping[str, Part]
"""Every stored tensor of a checkpoint, by name."""

_HINT = "download the checkpoint again, or convert the one that it was made from"


@dataclass(frozen=True)
class Model:
    """``stated``: what config.json says of the quantization, ``{}`` if nothing; ``dtype``: the tag
    of what the model computes in; ``read``: for a small part that tells of the others."""

    parts: Parts
    stated: Mapping[str, Any]
    dtype: str
    read: Callable[[Part], torch.Tensor]


def broken(name: str, what: str) -> CorruptFileError:
    """The error of a tensor whose parts do not fit together."""
    return CorruptFileError(f"tensor {shown(name)}: {what}", hint=_HINT)


def check_shape(name: str, part: Part, *allowed: tuple[int, ...]) -> None:
    """Raise CorruptFileError unless ``part``, which ``name`` needs, has one of these shapes."""
    if part.tensor.shape not in allowed:
        listed = " or ".join(str(list(shape)) for shape in allowed)
        raise broken(name, f"{part.tensor.name} is {list(part.tensor.shape)}, not {listed}")


def checked_scales(name: str, scales: torch.Tensor) -> torch.Tensor:
    """``scales`` in float32. Raises CorruptFileError if one is not finite, or zero."""
    values = scales.float()
    for what, bad in (("not finite", ~torch.isfinite(values)), ("zero", values == 0)):
        if bad.any():
            place = bad.nonzero()[0].tolist()
            raise broken(name, f"its scale at {place} is {what}")
    return values


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The 4-bit codes of uint8 (…, n), the lower one first: uint8 (…, 2 n)."""
    pairs = torch.stack((packed & 15, packed >> 4), dim=-1)
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def schemes(stated: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What compressed-tensors' config says of weights, group by group; of one matrix alone what is
    known of it."""
    if "num_bits" in stated:
        yield stated
    groups = stated.get("config_groups")
    for each in groups.values() if isinstance(groups, Mapping) else ():
        weights = each.get("weights") if isinstance(each, Mapping) else None
        if isinstance(weights, Mapping):
            yield weights


def grouped(name: str, index: torch.Tensor | None, columns: int, groups: int) -> torch.Tensor:
    """The group of each column, int64 (columns,): as ``index`` says, or one after the other. Raises
    CorruptFileError."""
    if index is None:
        return torch.arange(columns) // (columns // groups)
    group = index.long()
    if group.shape != (columns,) or not bool(((group >= 0) & (group < groups)).all()):
        raise broken(name, "g_idx names a group that is not there")
    return group
