"""The best scales of codes that are given, under second moments: least squares, row by row.

    min_s ||W - B A - Q(s)||_H,   Q(s) = s_g u_g in block g of a row

u are codes less zero points, or levels. A row's scales are a linear system, with

    M_gh = u_g H_gh u_h^T   and   b_g = u_g (E H)_g^T

of which the solution is what to add to the scales that left E = W - B A - Q.
"""

from __future__ import annotations

import torch

from loftq_cli.numerics.quantizers.blocks import Quantized, block_count
from loftq_cli.numerics.quantizers.scale_storage import Stored, rounding_like
from loftq_cli.numerics.quantizers.trellis_code import SEQUENCE

_RIDGE = 1e-3  # of the mean of M's diagonal: what products in bfloat16 lose
_MOST = 2.0  # what a scale is multiplied or divided by at most
_CHUNK_ELEMENTS = 1 << 22


def can_refit(quantized: Quantized) -> bool:
    """Whether every block lies in one row, and a row has scales of its own."""
    size, columns = quantized.block_size, quantized.shape[1]
    return size > 0 and (quantized.levels is None or columns % size == 0)


def refit_scales(
    quantized: Quantized, remains: torch.Tensor, moments: torch.Tensor, stored: Stored
) -> torch.Tensor:
    """The scales, float32 (blocks,), of ``quantized``, which :func:`can_refit`, as they are stored.

    ``remains`` (out, in) is E; ``moments`` (in, in), symmetric, is H; both in the dtype to multiply
    in. Portable scales stay portable; one that would leave the range of its dtype, change its sign
    or change by more than the factor two stays as it was.
    """
    rows, columns = quantized.shape
    size = quantized.block_size
    groups = block_count(columns, size)
    scales = quantized.scales.view(rows, groups)
    unit = SEQUENCE if quantized.is_trellis else 1
    step = max(_CHUNK_ELEMENTS // max(columns, groups**2), 1)
    if step > unit:
        step = step // unit * unit
    wanted = torch.empty_like(scales)
    at_once = max(step, unit)  # whole sequences
    for first in range(0, rows, at_once):
        whole = slice(first, min(first + at_once, rows))
        part = quantized.part(whole, slice(first * groups, whole.stop * groups))
        units = part.unscaled().to(moments.dtype)
        for start in range(first, whole.stop, step):
            chosen = slice(start, min(start + step, whole.stop))
            own = units[start - first : chosen.stop - first]
            wanted[chosen] = scales[chosen] + _added(own, size, remains[chosen], moments)
    ratio = wanted / scales
    kept = torch.where((ratio > 1 / _MOST) & (ratio < _MOST), wanted, scales).view(-1)
    return rounding_like(quantized.scales, stored)(kept)


def _added(
    units: torch.Tensor, size: int, remains: torch.Tensor, moments: torch.Tensor
) -> torch.Tensor:
    """What to add to the scales of some rows, float32 (rows, groups)."""
    rows, columns = units.shape
    groups = block_count(columns, size)
    system = torch.empty((rows, groups, groups), device=units.device)

    def by_blocks(products: torch.Tensor) -> torch.Tensor:
        missing = -products.shape[1] % size
        return torch.nn.functional.pad(products, (0, missing)).view(rows, -1, size).sum(dim=2)

    for group in range(groups):
        start = group * size
        own = slice(start, min(start + size, columns))
        image = (units[:, own] @ moments[own, start:]).float()
        system[:, group, group:] = by_blocks(image.mul_(units[:, start:]))
    wanted = by_blocks((remains @ moments).float().mul_(units)).double()
    full = system.double()
    full = full.triu() + full.triu(1).mT
    diagonal = full.diagonal(dim1=1, dim2=2)
    diagonal.add_(_RIDGE * diagonal.mean(dim=1, keepdim=True) + torch.finfo(torch.float32).tiny)
    factor, failed = torch.linalg.cholesky_ex(full)
    added = torch.cholesky_solve(wanted[..., None], factor)[..., 0]
    return torch.where(failed[:, None] == 0, added, 0.0).float()


def working_bytes(columns: int, block_size: int, together: int) -> int:
    """About what :func:`refit_scales` needs beside its arguments; ``together``: rows that are
    decoded together at least."""
    most = max(_CHUNK_ELEMENTS, columns, block_count(columns, block_size) ** 2)
    return 40 * most + 24 * together * columns
