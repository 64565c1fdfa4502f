"""How much disk and memory a refinement takes, and so what of it there is room for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.families.blocks import block_of
from loftq_cli.machine.resources import available_memory, check_memory
from loftq_cli.refinement.conversion import Conversion
from loftq_cli.refinement.settings import BATCH, Refining

_MARGIN = 4 << 20  # room for config, manifest and journal
_COPIES = 12
"""Of a weight, in float32, while it is trained: itself, its gradient and the latent value's, two of
the optimizer, two snapshots, and what is computed on the way."""
_OF_INPUT = 6  # bytes that are kept of a value that goes into a matrix or comes out of it
_OF_LOGIT = 16
_SHARE = 0.8
"""Of the free memory that may be planned with."""
_LENGTH = 512


def disk_bytes(conversion: Conversion) -> int:
    """What is written: the output, and every finished matrix once before, twice if the whole
    model is trained as well."""
    files: int = sum(entry["size"] for entry in conversion.output.manifest["outputs"])
    matrices = sum(_size(held.specs) for held in conversion.held.values())
    return files + 2 * matrices + _MARGIN


@dataclass(frozen=True)
class Memory:
    """What training ``conversion`` takes, in bytes."""

    conversion: Conversion
    length: int

    @property
    def largest_block(self) -> int:
        """Of one block."""
        sizes: Counter[tuple[str, int] | None] = Counter()
        for name, held in self.conversion.held.items():
            sizes[block_of(name)] += held.matrix.elements
        return max(sizes.values()) * 4 * _COPIES

    @property
    def whole(self) -> int:
        """Of the whole model, whose blocks keep nothing but their inputs."""
        elements = sum(held.matrix.elements for held in self.conversion.held.values())
        others = sum(tensor.elements for tensor in self.conversion.original.tensors) - elements
        vocabulary = int(self.conversion.original.config.content.get("vocab_size") or 0)
        logits = BATCH * self.length * vocabulary * _OF_LOGIT
        return elements * 4 * _COPIES + others * 4 + logits

    @property
    def activations(self) -> int:
        """Of what is kept beyond that if blocks keep everything."""
        sides = sum(sum(held.matrix.shape) for held in self.conversion.held.values())
        return BATCH * self.length * sides * _OF_INPUT


def resolved(conversion: Conversion, wanted: Refining, device: torch.device) -> Refining:
    """``wanted`` with what it leaves open: end to end if there is memory for the whole model, else
    block by block.

    Raises EnvironmentFailure if there is not enough for what is asked for.
    """
    memory = Memory(conversion, wanted.length or _LENGTH)
    chosen = wanted.settled(whole=fits(memory.whole, device))
    if chosen.end_to_end:
        what, hint = "the whole model, end to end", "free memory, or use --end-to-end 0"
        check_memory(memory.whole, what, device, hint=hint)
    check_memory(memory.largest_block, "the largest block", device, hint="free memory")
    return chosen


def fits(needed: int, device: torch.device) -> bool:
    """Whether so many bytes can be planned with."""
    room = available_memory(device, swap=False)
    return room is None or needed <= _SHARE * room


def _size(specs: list[TensorSpec]) -> int:
    return sum(spec.nbytes for spec in specs)
