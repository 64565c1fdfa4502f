"""The trellis code: codes of 2 bits, of which several of a column choose a level together.

A level is one of 1,024, and its number has 10 bits: the code of the weight itself in the lowest
two, above them that of the row above, and so on for five rows. A column is divided into sequences
of :data:`SEQUENCE` rows, the last one short. A sequence is a ring: above its first row is its last.
In one of fewer than :data:`SHORTEST` rows, which would hold itself too tightly, every code chooses
alone between four of the levels.

The levels are the quantiles of a normal distribution in an order without order, so that whatever
codes came before, four different ones are at hand (QTIP, arXiv:2406.11235, section 3; the order is
our own).
"""

from __future__ import annotations

import functools

import torch

BITS = 2
"""Of a code."""
WINDOW = 10
"""Bits of a level's number."""
SEQUENCE = 256
"""Rows of a sequence: whoever takes rows of such a matrix takes whole sequences."""
SHORTEST = 24
"""Rows of a sequence that is a ring."""

_FIRST, _SECOND = 0x8E83FDEB, 0x2C1B3C6D  # odd: the first is the best of 1,500
_STEPS = 1 << 13  # levels are multiples of 1 / this: no rounding of a library's ndtri shows
_ALONE = (-1.510, -0.4528, 0.4528, 1.510)  # Max, "Quantizing for minimum distortion", 1960


def _low_product(values: torch.Tensor, factor: int) -> torch.Tensor:
    """The lower 32 bits of a product of 32-bit numbers, int64."""
    high, low = values >> 16, values & 0xFFFF
    return (low * factor + ((high * factor & 0xFFFF) << 16)) & 0xFFFFFFFF


def _table() -> torch.Tensor:
    """The levels by number, float32 (1024,), of unit mean square."""
    count = 1 << WINDOW
    places = torch.arange(count, dtype=torch.float64, device="cpu")
    mixed = _low_product(places.long(), _FIRST)
    mixed = _low_product(mixed ^ mixed >> 15, _SECOND)
    rank = (mixed ^ mixed >> 12).argsort(stable=True).argsort()
    quantiles = torch.special.ndtri((places + 0.5) / count)
    quantiles /= quantiles.square().mean().sqrt()
    table: torch.Tensor = ((quantiles * _STEPS).round() / _STEPS)[rank].float()
    return table


# Made at once: a compiled graph has them as constants.
_LEVELS = _table()
_CHOICE = torch.tensor(
    [int((_LEVELS - value).abs().argmin()) for value in _ALONE], dtype=torch.int32, device="cpu"
)


def levels(device: torch.device) -> torch.Tensor:
    """The levels by number, float32 (1024,) on ``device``, of unit mean square."""
    return _on(device, _LEVELS)


def are_levels(levels: torch.Tensor | None) -> bool:
    """Whether ``levels`` are those of the trellis code: a code alone has 256 at most."""
    return levels is not None and len(levels) == 1 << WINDOW


def alone(device: torch.device) -> torch.Tensor:
    """The numbers of the levels that a code chooses between alone, int32 (4,) on ``device``: those
    nearest to the best four for a normal distribution."""
    return _on(device, _CHOICE)


def _on(device: torch.device, table: torch.Tensor) -> torch.Tensor:
    if device.type == "cpu":
        return table
    return table.to(device) if torch.compiler.is_compiling() else _brought(device, table)


@functools.cache
def _brought(device: torch.device, table: torch.Tensor) -> torch.Tensor:
    return table.to(device)


def numbers(codes: torch.Tensor) -> torch.Tensor:
    """The numbers of their levels, int32 (out, in), of ``codes`` uint8 (out, in), whose first row
    begins a sequence."""
    rows, columns = codes.shape
    whole = rows - rows % SEQUENCE
    parts = [_of_rings(codes[:whole].view(-1, SEQUENCE, columns)).view(-1, columns)]
    rest = codes[whole:]
    if len(rest) >= SHORTEST:
        parts.append(_of_rings(rest[None])[0])
    elif len(rest):
        parts.append(alone(codes.device)[rest.int()])
    return torch.cat(parts)


def above(chosen: torch.Tensor, rows: int) -> torch.Tensor:
    """The rows whose codes the levels of the ``chosen`` rows, int64 (count,), of ``rows`` in all
    are chosen by: int64 (5, count), the first of them their own."""
    first = chosen - chosen % SEQUENCE
    length = (rows - first).clamp(max=SEQUENCE)
    steps = torch.arange(WINDOW // BITS, device=chosen.device)[:, None]
    return first + (chosen - first - steps) % length


def numbers_of(codes: torch.Tensor, chosen: torch.Tensor, rows: int) -> torch.Tensor:
    """The numbers of the levels of the ``chosen`` rows, int32 (count, in), by ``codes`` uint8
    (5, count, in) of the rows :func:`above`."""
    shifts = torch.arange(0, WINDOW, BITS, device=codes.device, dtype=torch.int32)
    together = (codes.int() << shifts[:, None, None]).sum(dim=0, dtype=torch.int32)
    whole = rows - rows % SEQUENCE
    if rows - whole >= SHORTEST or rows == whole:
        return together
    return torch.where((chosen < whole)[:, None], together, alone(codes.device)[codes[0].int()])


def _of_rings(codes: torch.Tensor) -> torch.Tensor:
    """Of ``codes`` (sequences, rows, in)."""
    found = codes.int()
    covered = BITS
    while covered < WINDOW:  # twice as much of the window each time
        found = found | found.roll(covered // BITS, dims=1) << covered
        covered *= 2
    return found & ((1 << WINDOW) - 1)
