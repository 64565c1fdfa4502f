"""Feedback's panels of columns in one kernel each: on a CUDA device, if triton is there
(kernels/triton_feedback.py), and of the trellis code on the host (kernels/trellis.c)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from loftq_cli.kernels import native
from loftq_cli.numerics.quantizers import native_trellis
from loftq_cli.numerics.quantizers.base import Quantizer
from loftq_cli.numerics.quantizers.codebook import CodebookQuantizer
from loftq_cli.numerics.quantizers.trellis import TrellisQuantizer
from loftq_cli.numerics.quantizers.uniform import UniformQuantizer

Panel = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""As ``feedback._quantize_panel``, without its first argument."""


def fused_panel(quantizer: Quantizer, device: torch.device) -> Panel | None:
    """The kernel for ``quantizer`` on ``device``; None if there is none."""
    if isinstance(quantizer, TrellisQuantizer):
        compiled = quantizer.native and native.available()
        return native_trellis.quantize_panel if compiled else None
    kernels = _kernels() if device.type == "cuda" else None
    if kernels is None:
        return None
    levels = boundaries = None
    if isinstance(quantizer, CodebookQuantizer) and quantizer.bits <= kernels.LARGEST:
        table = quantizer.table.to(device)
        levels, boundaries = table.levels, table.boundaries
    elif not isinstance(quantizer, UniformQuantizer):
        return None
    return functools.partial(
        kernels.quantize_panel, bits=quantizer.bits, levels=levels, boundaries=boundaries
    )


@functools.cache
def _kernels() -> Any:
    """The module, None if triton is not installed."""
    try:
        from loftq_cli.kernels import triton_feedback
    except ImportError:
        return None
    return triton_feedback
