"""How much disk and memory a refinement takes, before it begins."""

from __future__ import annotations

from collections import Counter

import torch

from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.families.blocks import block_of
from loftq_cli.machine.resources import check_memory
from loftq_cli.refinement.conversion import Conversion
from loftq_cli.refinement.settings import Refining

_MARGIN = 4 << 20  # room for config, manifest and journal
_COPIES = 12
"""Of a weight, in float32, while it is trained: itself, its gradient and the latent value's, two of
the optimizer, two snapshots, and what is computed on the way."""


def disk_bytes(conversion: Conversion) -> int:
    """What is written: the output, and every finished matrix once before, twice if the whole
    model is trained as well."""
    files: int = sum(entry["size"] for entry in conversion.output.manifest["outputs"])
    matrices = sum(_size(held.specs) for held in conversion.held.values())
    return files + 2 * matrices + _MARGIN


def check_memory_of(conversion: Conversion, wanted: Refining, device: torch.device) -> None:
    """Raise EnvironmentFailure if the largest block, or, end to end, the whole model, cannot be
    trained in the memory that there is."""
    sizes: Counter[tuple[str, int] | None] = Counter()
    for name, held in conversion.held.items():
        sizes[block_of(name)] += held.matrix.elements
    needed, what, hint = max(sizes.values()), "the largest block", "free memory"
    if wanted.end_to_end:
        needed, what = sum(sizes.values()), "the whole model, end to end"
        hint = "free memory, or leave out --end-to-end"
    check_memory(needed * 4 * _COPIES, what, device, hint=hint)


def _size(specs: list[TensorSpec]) -> int:
    return sum(spec.nbytes for spec in specs)
