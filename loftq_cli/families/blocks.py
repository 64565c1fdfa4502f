"""Blocks: which stack of repeated layers a tensor is in, and in which of its numbers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_IN_BLOCK = re.compile(r"(?:^|\.)\d+\.")
_NUMBERED = re.compile(r"((?:.*?\.)??(?:layers?|blocks?|h))\.(\d+)\.")


def is_in_block(name: str) -> bool:
    """Whether a tensor lies in a repeated block: a path with a number in it."""
    return bool(_IN_BLOCK.search(name))


def stacks(names: Iterable[str]) -> list[str]:
    """The paths of the stacks of blocks that ``names`` lie in: what precedes the first number."""
    return sorted({place[0] for name in names if (place := block_of(name))})


def block_of(name: str) -> tuple[str, int] | None:
    """(path of the stack of blocks, number of the block) of a tensor, None outside of stacks."""
    match = re.match(r"(.*?)\.?(\d+)\.", name)
    return (match.group(1), int(match.group(2))) if match else None


def layers_by_stack(names: Collection[str]) -> dict[str, dict[int, list[str]]]:
    """The names in each stack of layers, by the number of the block."""
    stacks: dict[str, dict[int, list[str]]] = {}
    for name in names:
        if match := _NUMBERED.match(name):
            stacks.setdefault(match[1], {}).setdefault(int(match[2]), []).append(name)
    return stacks


def stack_of(name: str) -> str | None:
    """The path of the stack of blocks that ``name`` is in, None outside of stacks."""
    place = block_of(name)
    return place and place[0]
