"""How large that is what ``make gpu`` measures: as in Llama-2-7b, or tiny for a test of it."""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, int]


@dataclass(frozen=True)
class Scale:
    """``shapes`` (out, in) of single matrices; ``hidden``, ``intermediate`` and ``layers`` of a
    checkpoint; ``checked``: shape of what is compared with the CPU; ``iters`` and ``rank``;
    ``runs`` of each measurement; ``roof``: side of the matrices whose copy and product are the
    roofs; ``trained``: layers of the model that is trained, with ``tokens``; ``seconds`` until the
    last part may begin."""

    shapes: tuple[Shape, ...]
    hidden: int
    intermediate: int
    layers: int
    checked: Shape
    iters: int
    rank: int
    runs: int
    roof: int
    trained: int
    tokens: int
    seconds: float


FULL = Scale(
    shapes=((4096, 4096), (4096, 11008)),
    hidden=4096,
    intermediate=11008,
    layers=32,
    checked=(256, 192),
    iters=5,
    rank=64,
    runs=3,
    roof=8192,
    trained=4,
    tokens=2048,
    seconds=420.0,
)
TINY = Scale(
    shapes=((64, 64), (64, 96)),
    hidden=64,
    intermediate=128,
    layers=1,
    checked=(16, 70),
    iters=1,
    rank=8,
    runs=1,
    roof=64,
    trained=1,
    tokens=16,
    seconds=3600.0,
)
