"""Portable scales: values that every container holds as they are.

At most 7 significant bits, in multiples of 2^-24, and below 65,536: float16 and bfloat16 hold them
exactly, and float16 holds a portable scale times a zero point of up to 4 bits, too.
"""

from __future__ import annotations

import torch

SIGNIFICANT_BITS = 7
_SMALLEST = -24  # the exponent of float16's smallest number
_LARGEST = 65_504.0  # float16's


def portable(scales: torch.Tensor) -> torch.Tensor:
    """Float32 ``scales`` rounded to the nearest portable ones, ties to even. What is too small
    becomes 0, what is too large infinite."""
    _, exponents = torch.frexp(scales)
    steps = torch.ldexp(torch.ones_like(scales), (exponents - SIGNIFICANT_BITS).clamp(_SMALLEST))
    rounded = (scales / steps).round_().mul_(steps)
    return torch.where(rounded.abs() > _LARGEST, rounded * torch.inf, rounded)


def is_portable(scales: torch.Tensor) -> bool:
    """Whether all of these float32 ``scales`` are portable."""
    return bool((portable(scales) == scales).all())


def where_kept(rounded: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """``rounded`` scales, and ``otherwise`` those that left the range: became infinite, or 0."""
    lost = torch.isinf(rounded) | ((rounded == 0) & (otherwise != 0))
    return torch.where(lost, otherwise, rounded)
