"""LoftQ on one matrix in memory, with the converter's settings and defaults."""

from __future__ import annotations

from typing import Any, cast

import torch

from loftq_cli.errors import NonFiniteWeightError, UsageError
from loftq_cli.numerics.alternation import decompose as alternate
from loftq_cli.numerics.decomposition import Decomposition, Settings
from loftq_cli.numerics.metrics import first_non_finite
from loftq_cli.numerics.quantizers.methods import make_quantizer
from loftq_cli.planning.choices import choose_variant, resolve_method
from loftq_cli.settings.recipe import Options

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def decompose(weight: torch.Tensor, options: Options) -> Decomposition:
    """Decompose ``weight`` (out, in); A and B in its dtype. See ``loftq_cli.decompose``."""
    if weight.dim() != 2 or weight.dtype not in _DTYPES or weight.numel() == 0:
        raise UsageError(
            f"weight of shape {tuple(weight.shape)} and {weight.dtype}: a non-empty "
            "two-dimensional float32, float16 or bfloat16 tensor is needed",
            hint="",
        )
    resolved = options.resolve()
    bad = first_non_finite(weight)
    if bad is not None:
        raise NonFiniteWeightError(f"weight holds {bad[1]} at {list(bad[0])}", hint="")
    bits = resolved.bits
    if not isinstance(bits, int):
        raise UsageError(f"bits {bits}: one matrix has one width, a whole number", hint="")
    method = resolve_method(resolved, bits)
    scale = cast(Any, resolved.scale)
    variant = choose_variant(weight.device, method, scale, resolved.svd)
    quantizer = make_quantizer(
        method,
        bits,
        resolved.block_size,
        scale,
        native=variant.native,
    )
    settings = Settings(
        rank=resolved.rank,
        iters=resolved.iters,
        order=cast(Any, resolved.order),
        svd=cast(Any, resolved.svd),
        keep=cast(Any, resolved.keep),
        momentum=resolved.momentum,
        products=variant.products,
        adapter_dtype=weight.dtype,
        scale_dtype=cast(Any, resolved.scale_dtype),
        seed=resolved.seed,
    )
    return alternate(weight.detach(), quantizer, settings)
