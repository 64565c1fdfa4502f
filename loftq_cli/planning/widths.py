"""The width and rank of every matrix, from the settings and the names alone.

What decides, the first that applies: an entry of the map, widths that a target has settled, the
target, ``bits``. A fraction of ``bits`` is the paper's mix: the first int(L * (bits - 2) / 2)
of the L blocks of a stack in 4 bits, the rest in 2.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction

from loftq_cli.errors import UsageError
from loftq_cli.families.blocks import block_of
from loftq_cli.settings import maps
from loftq_cli.settings.table import MIXED, Settings


def assign_widths(
    settings: Settings, names: Sequence[str], tensors: Sequence[str]
) -> dict[str, int | None]:
    """The width of each of ``names``, the matrices; None if a target is yet to settle it.

    ``tensors`` are all names in the checkpoint, from which the blocks of a stack are counted.
    Raises PatternError or UsageError if the map does not fit the names.
    """
    mapped = maps.apply("--bits-map", settings.bits_map, names)
    rest = [name for name in names if name not in mapped]
    if settings.bits is None:
        ruled: Mapping[str, int | None] = _settled(settings, rest)
    elif isinstance(settings.bits, int):
        ruled = dict.fromkeys(rest, settings.bits)
    elif not rest:
        raise UsageError(f"--bits-map leaves no matrix to --bits {settings.bits}")
    else:
        ruled = _mixed(settings.bits, rest, tensors)
    widths = {**mapped, **ruled}
    return {name: widths[name] for name in names}


def assign_ranks(settings: Settings, names: Sequence[str]) -> dict[str, int]:
    """The rank of each of ``names``, not yet clamped to its shape. Raises like
    :func:`assign_widths`."""
    mapped = maps.apply("--rank-map", settings.rank_map, names)
    return {name: mapped.get(name, settings.rank) for name in names}


def _settled(settings: Settings, names: Sequence[str]) -> dict[str, int | None]:
    if not settings.widths:
        return dict.fromkeys(names)
    settled = maps.parse("widths", settings.widths)
    strange = sorted(settled.keys() ^ set(names))
    if strange:
        raise UsageError(
            f"the recipe's widths are of other matrices: they and this conversion do not both have "
            f"{strange[0]!r}",
            hint="without its `widths` the recipe settles them anew",
        )
    return dict(settled)


def _mixed(bits: float, names: Sequence[str], tensors: Sequence[str]) -> dict[str, int]:
    narrow, wide = MIXED
    numbers = defaultdict(set)
    for tensor in tensors:
        if (place := block_of(tensor)) is not None:
            numbers[place[0]].add(place[1])
    # From the decimal digits: 10 * (2.4 - 2) / 2 is less than 2 in binary.
    share = (Fraction(str(bits)) - narrow) / (wide - narrow)
    first = {
        stack: set(sorted(blocks)[: int(len(blocks) * share)]) for stack, blocks in numbers.items()
    }
    widths = {}
    for name in names:
        place = block_of(name)
        widths[name] = wide if place is not None and place[1] in first[place[0]] else narrow
    return widths
