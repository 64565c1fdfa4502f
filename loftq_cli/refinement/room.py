"""How much disk and memory a refinement takes, and so what of it there is room for."""

from __future__ import annotations

import torch

from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.machine import launched
from loftq_cli.machine.resources import available_memory, check_memory
from loftq_cli.refinement.conversion import Conversion
from loftq_cli.refinement.cost import Size, size_of
from loftq_cli.refinement.settings import Refining

_MARGIN = 4 << 20  # room for config, manifest and journal
_SHARE = 0.8
"""Of the free memory that may be planned with."""
LENGTH = 512
"""Tokens a window, if the model takes as many."""


def disk_bytes(conversion: Conversion) -> int:
    """What is written: the output, and every finished matrix once before, twice if the whole
    model is trained as well."""
    files: int = sum(entry["size"] for entry in conversion.output.manifest["outputs"])
    matrices = sum(_size(held.specs) for held in conversion.held.values())
    return files + 2 * matrices + _MARGIN


def resolved(conversion: Conversion, wanted: Refining, device: torch.device) -> Refining:
    """``wanted`` with what it leaves open. Raises EnvironmentFailure if there is not enough memory
    for what is asked for."""
    size, processes = size_of_conversion(conversion), launched.beside(device.type)
    chosen = planned(wanted, size, device)
    each = "" if processes == 1 else f", in each of {processes} processes"
    if chosen.end_to_end:
        what, hint = f"the whole model, end to end{each}", "free memory, or use --end-to-end 0"
        needed = size.whole_memory(wanted.length or LENGTH) * processes
        check_memory(needed, what, device, hint=hint)
    needed = size.block_memory() * processes
    check_memory(needed, f"the largest block{each}", device, hint="free memory")
    return chosen


def planned(wanted: Refining, size: Size, device: torch.device) -> Refining:
    """``wanted`` with what it leaves open, for a model of that size: end to end if there is memory
    for the whole model, else block by block."""
    return wanted.settled(whole=fits(size.whole_memory(wanted.length or LENGTH), device))


def size_of_conversion(conversion: Conversion) -> Size:
    """The size of the model that was converted."""
    return size_of(
        (held.matrix for held in conversion.held.values()),
        sum(tensor.elements for tensor in conversion.original.tensors),
        conversion.original.config.content,
    )


def fits(needed: int, device: torch.device) -> bool:
    """Whether so many bytes can be planned with."""
    room = available_memory(device, swap=False)
    return room is None or needed * launched.beside(device.type) <= _SHARE * room


def _size(specs: list[TensorSpec]) -> int:
    return sum(spec.nbytes for spec in specs)
