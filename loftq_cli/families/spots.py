"""Where in a model a matrix is: what kind of layer it is of, and how deep."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

_EXPERTS = "experts"
# The order in which a block computes, which is not that of a file.
_ORDER = (
    *("q_proj", "query", "k_proj", "key", "v_proj", "value", "qkv_proj", "c_attn", "o_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
)

_Path = tuple[str, ...]


@dataclass(frozen=True)
class Spot:
    """The ``kind`` of a layer, the shortest end of its name that no other kind has, and the number
    of its ``block``, None outside of blocks."""

    kind: str
    block: int | None


def spots(modules: Iterable[str]) -> dict[str, Spot]:
    """The spot of each of ``modules``, in the order in which a block computes where that is known.

    Numbers inside a block, those of experts among them, make no kinds of their own. If there are
    several stacks of blocks, kinds begin with what tells the stacks apart.
    """
    placed = {module: _placed(module) for module in modules}
    stacks = sorted({stack for stack, block, _ in placed.values() if block is not None})
    titles = dict(zip(stacks, _apart(stacks), strict=True))
    kinds: dict[tuple[_Path, _Path], str] = {}
    for stack in {stack for stack, _, _ in placed.values()}:
        paths = {inner for at, _, inner in placed.values() if at == stack}
        for path, short in _shortened(paths).items():
            title = titles.get(stack, "")
            kinds[stack, path] = f"{title} {short}" if title else short
    found = {
        module: Spot(kinds[stack, inner], block) for module, (stack, block, inner) in placed.items()
    }
    return dict(sorted(found.items(), key=lambda item: _rank(item[1])))


def _placed(module: str) -> tuple[_Path, int | None, _Path]:
    """(path of the stack of blocks, number of the block, path inside of it)."""
    parts = module.split(".")
    at = next((n for n, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    if at is None:
        return (), None, tuple(parts)
    inner = parts[at + 1 :]
    path = (part for n, part in enumerate(inner, 1) if n == len(inner) or not part.isdecimal())
    return (*parts[:at], ""), int(parts[at]), tuple(path)  # "": apart from what is outside


def _shortened(paths: Collection[_Path]) -> dict[_Path, str]:
    """The shortest end of each path that is no other's, else the whole."""
    ends: dict[_Path, int] = {}
    for path in paths:
        for start in range(len(path)):
            ends[path[start:]] = ends.get(path[start:], 0) + 1
    found = {}
    for path in paths:
        starts = range(len(path) - 1, -1, -1)
        alone = (n for n in starts if ends[path[n:]] == 1 and not path[n].isdecimal())
        end = path[next(alone, 0) :]
        expert = _EXPERTS in path and _EXPERTS not in end
        found[path] = ".".join((_EXPERTS, *end) if expert else end)
    return found


def _apart(stacks: Sequence[_Path]) -> list[str]:
    """What tells the paths of stacks apart: what not all begin and end with."""
    shortest = min(map(len, stacks), default=0)
    first = next((n for n in range(shortest) if len({s[n] for s in stacks}) > 1), shortest)
    rest = [stack[first:] for stack in stacks]
    shortest = min(map(len, rest), default=0)
    last = next((n for n in range(shortest) if len({s[-1 - n] for s in rest}) > 1), shortest)
    return [".".join(stack[: len(stack) - last]) for stack in rest]


def _rank(spot: Spot) -> tuple[bool, int]:
    leaf = spot.kind.rpartition(" ")[2].rpartition(".")[2]
    return spot.block is None, _ORDER.index(leaf) if leaf in _ORDER else len(_ORDER)
