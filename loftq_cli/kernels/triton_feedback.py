"""One panel of feedback's columns in one Triton kernel: in tensor operations each of its columns is
some twenty launches, which take a GPU longer than the arithmetic.

Rows are independent, and a program takes a few of them through all columns of the panel, from the
last to the first, with the panel's errors in registers. The arithmetic is that of
:func:`loftq_cli.numerics.feedback.requantize`, the sum over the later columns' errors in another
order. Importing this module imports triton.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

_ROWS = 64  # per program
_STORES = {None: 0, torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LARGEST = 4
"""Bits: every level's boundary is compared with, so more of them would be slow."""


def quantize_panel(
    targets: torch.Tensor,
    added: torch.Tensor,
    factor: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    *,
    levels: torch.Tensor | None,
    boundaries: torch.Tensor | None,
    bits: int,
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8, values float32), (columns, out), of float32 ``targets`` (columns, out), on a
    CUDA device, each quantized after ``added`` and the errors of those behind it, through the unit
    upper triangular ``factor`` (columns, columns).

    ``scales`` and ``zeros`` float32 (columns, out); or no zeros, and ``levels`` float32 (2**bits,)
    with the ``boundaries`` (2**bits - 1,) that decide between them. ``dtype``: what values are
    rounded to, None for nothing.
    """
    columns, rows = targets.shape
    codes = torch.empty(targets.shape, dtype=torch.uint8, device=targets.device)
    values = torch.empty_like(targets)
    width = triton.next_power_of_2(columns)
    unused = scales
    # triton launches on the current device
    with torch.cuda.device_of(targets):  # type: ignore[no-untyped-call]
        _kernel[(triton.cdiv(rows, _ROWS),)](
            (targets + added).contiguous(),
            targets.contiguous(),
            factor.contiguous(),
            scales.contiguous(),
            unused if zeros is None else zeros.contiguous(),
            unused if levels is None else levels,
            unused if boundaries is None else boundaries,
            codes,
            values,
            rows,
            columns,
            TOP=2**bits - 1,
            AFFINE=zeros is not None,
            STORE=_STORES[dtype],
            WIDTH=width,
            ROWS=_ROWS,
        )
    return codes, values


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _kernel(  # type: ignore[no-untyped-def]
    begun,
    targets,
    factor,
    scales,
    zeros,
    levels,
    boundaries,
    codes,
    values,
    rows,
    columns,
    TOP: tl.constexpr,
    AFFINE: tl.constexpr,
    STORE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    later = tl.arange(0, WIDTH)
    errors = tl.zeros((WIDTH, ROWS), dtype=tl.float32)
    for step in range(columns):
        column = columns - 1 - step
        place = column.to(tl.int64) * rows + row
        weights = tl.load(
            factor + column * columns + later,
            mask=(later > column) & (later < columns),
            other=0.0,
        )
        wanted = tl.load(begun + place, mask=inside, other=0.0)
        wanted += tl.sum(weights[:, None] * errors, axis=0)
        # After an overflow, which whoever asked finds in ||R||.
        wanted = tl.where(wanted == wanted, wanted, 0.0)
        wanted = tl.minimum(tl.maximum(wanted, -3.4028234663852886e38), 3.4028234663852886e38)
        scale = tl.load(scales + place, mask=inside, other=1.0)
        unit = tl.div_rn(wanted, tl.where(scale == 0.0, 1.0, scale))
        if AFFINE:
            zero = tl.load(zeros + place, mask=inside, other=0.0)
            unit = tl.minimum(tl.maximum(unit, -zero), TOP - zero)
            offset = (unit + 12582912.0) - 12582912.0  # to the nearest, ties to even
            code = (offset + zero).to(tl.int32)
            value = offset * scale
        else:
            code = tl.zeros((ROWS,), dtype=tl.int32)
            for number in tl.static_range(TOP):
                code += (unit > tl.load(boundaries + number)).to(tl.int32)
            value = tl.load(levels + code) * scale
        if STORE == 1:
            value = value.to(tl.bfloat16).to(tl.float32)
        if STORE == 2:
            value = value.to(tl.float16).to(tl.float32)
        tl.store(codes + place, code.to(tl.uint8), mask=inside)
        tl.store(values + place, value, mask=inside)
        target = tl.load(targets + place, mask=inside, other=0.0)
        errors = tl.where(later[:, None] == column, (target - value)[None, :], errors)
