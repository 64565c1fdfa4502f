"""How scales are stored: float32, bfloat16, or int8 with steps of their own; and what they are
rounded to beforehand, if a container of their method has less.

int8 quantizes the scales once more: 64 consecutive ones share a step, stored in bfloat16, and
``scale = code * step``. A step is the group's largest magnitude over 127, rounded, and the code of
that largest scale is +-127 whatever the rounding did. So 127 * step, exact in float32, gives the
same step again, and every code with it: scales that were rounded once do not change any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from loftq_cli.numerics.quantizers.portable import is_portable, portable, where_kept

ScaleDtype = Literal["float32", "bfloat16", "int8"]

Stored = Literal["float32", "bfloat16", "int8", "half"]
"""A ScaleDtype; or "half": a 128th of each is portable, so that float16 holds it."""

_UNIT = 128

STEP_GROUP = 64
"""Consecutive scales that share a step; the last group may be short."""

_TOP = 127


def round_scales(scales: torch.Tensor, dtype: Stored) -> torch.Tensor:
    """The float32 values that ``scales``, float32 (blocks,), have once they are stored. Idempotent.

    bfloat16 rounds to the nearest, ties to even; what is above its largest value becomes infinite.
    Under int8 no scale but 0 becomes 0, unless its group is too small for any step. Under half
    those that would leave float16's range stay as they are.
    """
    if dtype == "half":
        return where_kept(portable(scales / _UNIT) * _UNIT, scales)
    return unpack_scales(*pack_scales(scales, dtype))


def rounding_like(held: torch.Tensor, dtype: Stored) -> Callable[[torch.Tensor], torch.Tensor]:
    """What rounds changed scales, float32 (blocks,), to what is stored in ``dtype`` in the place of
    ``held``: portable ones stay portable, and one that would leave the range stays as it was."""
    keeps = dtype in ("float32", "bfloat16") and is_portable(held)

    def rounded(scales: torch.Tensor) -> torch.Tensor:
        return where_kept(portable(scales) if keeps else round_scales(scales, dtype), held)

    return rounded


def pack_scales(
    scales: torch.Tensor, dtype: ScaleDtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(the stored scales, in ``dtype`` (blocks,), and for int8 their steps, bfloat16
    (ceil(blocks / 64),)) of float32 ``scales`` (blocks,)."""
    if dtype == "float32":
        return scales, None
    if dtype == "bfloat16":
        return scales.to(torch.bfloat16), None
    count = scales.numel()
    groups = torch.nn.functional.pad(scales, (0, -count % STEP_GROUP)).view(-1, STEP_GROUP)
    magnitudes = groups.abs()
    largest = magnitudes.amax(dim=1, keepdim=True)
    steps = (largest / _TOP).to(torch.bfloat16)
    divisor = torch.where(steps == 0, torch.ones_like(largest), steps.float())
    codes = (magnitudes / divisor).round_().clamp_(1, _TOP)
    # By rounding alone it would be less if the step is subnormal, and of few digits.
    codes = torch.where(magnitudes == largest, torch.full_like(codes, _TOP), codes)
    codes = torch.where(steps == 0, torch.zeros_like(codes), codes) * groups.sign()
    return codes.to(torch.int8).view(-1)[:count], steps.view(-1)


def unpack_scales(stored: torch.Tensor, steps: torch.Tensor | None) -> torch.Tensor:
    """The scales, float32 (blocks,), that :func:`pack_scales` stored."""
    scales = stored.float()
    if steps is None:
        return scales
    return scales * steps.float().repeat_interleave(STEP_GROUP)[: scales.numel()]
