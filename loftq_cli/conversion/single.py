"""LoftQ on one matrix in memory, with the converter's settings and defaults."""

from __future__ import annotations

import torch

from loftq_cli.checkpoint.dtypes import tag_of
from loftq_cli.errors import NonFiniteWeightError, UsageError
from loftq_cli.layouts import registry
from loftq_cli.layouts.base import Matrix
from loftq_cli.numerics.decomposition import Decomposition
from loftq_cli.numerics.metrics import first_non_finite
from loftq_cli.planning.choices import resolve_method
from loftq_cli.planning.decomposer import Decomposer
from loftq_cli.planning.make import settled
from loftq_cli.planning.plan import PlannedMatrix
from loftq_cli.settings.options import Options

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def decompose(weight: torch.Tensor, options: Options) -> Decomposition:
    """Decompose ``weight`` (out, in); A and B in its dtype. See ``loftq_cli.decompose``."""
    if weight.dim() != 2 or weight.dtype not in _DTYPES or weight.numel() == 0:
        raise UsageError(
            f"weight of shape {tuple(weight.shape)} and {weight.dtype}: a non-empty "
            "two-dimensional float32, float16 or bfloat16 tensor is needed",
            hint="",
        )
    settings = options.resolve()
    bad = first_non_finite(weight)
    if bad is not None:
        raise NonFiniteWeightError(f"weight holds {bad[1]} at {list(bad[0])}", hint="")
    bits = settings.bits
    if not isinstance(bits, int):
        raise UsageError(f"bits {bits}: one matrix has one width, a whole number", hint="")
    tag, (rows, columns) = tag_of(weight.dtype), weight.shape
    method = resolve_method(settings, bits)
    matrix = Matrix("", (rows, columns), tag, method, bits, settings.block_size)
    layout = registry.holding_everything()
    recipe = settled(settings, layout.name, method, weight.device)
    decomposer = Decomposer(recipe, layout.of(recipe.as_dict()), weight.device)
    item = PlannedMatrix(matrix, settings.rank, 1.0, tag, ())
    return decomposer.decompose(weight.detach(), item)
