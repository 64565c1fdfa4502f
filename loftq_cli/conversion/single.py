"""LoftQ on one matrix in memory, with the converter's settings and defaults."""

from __future__ import annotations

import torch

from loftq_cli.checkpoint.dtypes import resolve, tag_of
from loftq_cli.errors import NonFiniteWeightError, StatisticsError, UsageError
from loftq_cli.layouts import adapter, registry
from loftq_cli.layouts.base import Matrix
from loftq_cli.numerics.decomposition import Decomposition
from loftq_cli.numerics.metrics import first_non_finite
from loftq_cli.numerics.moments import Moments
from loftq_cli.planning.choices import resolve_method
from loftq_cli.planning.decomposer import Decomposer
from loftq_cli.planning.make import settled
from loftq_cli.planning.plan import PlannedMatrix
from loftq_cli.settings.options import Options
from loftq_cli.statistics.statistics import fault_of

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OF_ONE = (
    *("bits", "method", "rank", "iters", "block_size", "scale", "scale_dtype", "order", "svd"),
    *("keep", "momentum", "feedback", "feedback_passes", "lora_alpha", "adapter_dtype"),
    "seed",
)
"""Settings that concern one matrix."""


def decompose(
    weight: torch.Tensor, options: Options, moments: Moments | torch.Tensor | None = None
) -> Decomposition:
    """Decompose ``weight`` (out, in). See ``loftq_cli.decompose``."""
    if not isinstance(weight, torch.Tensor):
        raise UsageError(f"weight is a {type(weight).__name__}, not a torch.Tensor", hint="")
    if weight.is_meta or weight.layout != torch.strided:
        raise UsageError(
            "weight has no values here, or is sparse: a dense tensor is needed", hint=""
        )
    if weight.dim() != 2 or weight.dtype not in _DTYPES or weight.numel() == 0:
        raise UsageError(
            f"weight of shape {tuple(weight.shape)} and {weight.dtype}: a non-empty "
            "two-dimensional float32, float16 or bfloat16 tensor is needed",
            hint="",
        )
    for name in options.given:
        if name not in _OF_ONE:
            raise UsageError(f"{name} is not a setting of one matrix", hint="")
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
    item = PlannedMatrix(
        matrix,
        settings.rank,
        adapter.scaling(settings.lora_alpha, settings.rank),
        resolve(settings.adapter_dtype, tag),
        (),
    )
    decomposer = Decomposer(recipe, layout.of(recipe.as_dict()), weight.device)
    measured = None if moments is None else _checked(moments, columns)
    return decomposer.decompose(weight.detach(), item, measured)


def _checked(moments: Moments | torch.Tensor, in_features: int) -> torch.Tensor:
    """Second moments of one's own, float32 (in,) or (in, in). Raises UsageError or
    StatisticsError."""
    values = moments.value() if isinstance(moments, Moments) else moments.detach().float().clone()
    if tuple(values.shape) not in ((in_features,), (in_features, in_features)):
        raise UsageError(
            f"moments of shape {tuple(values.shape)}: ({in_features},) or "
            f"({in_features}, {in_features}) is needed",
            hint="",
        )
    if fault := fault_of(values):
        raise StatisticsError(f"the moments: {fault}", hint="")
    return values
