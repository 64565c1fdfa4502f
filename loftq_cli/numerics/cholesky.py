"""The Cholesky factor of a matrix that is never there as a whole."""

from __future__ import annotations

from collections.abc import Callable

import torch

_BLOCK = 256  # rows factored at once


def unit_factor(
    rows_of: Callable[[int, int], torch.Tensor],
    size: int,
    device: torch.device,
    dtype: torch.dtype,
    stored: torch.dtype,
) -> torch.Tensor | None:
    """U (size, size), unit upper triangular, in ``stored``, with H = U^T D U of a symmetric H and a
    diagonal D, computed in ``dtype``; None if H is not positive definite.

    ``rows_of(start, stop)``: float32 rows [start, stop) of H, from column ``start`` on, a tensor
    that may be written to. A block of rows is done after the other, which is as fast as products
    are, and makes one matrix beside the result, but for float32 in float32 none.
    """
    factor = torch.zeros((size, size), dtype=stored, device=device)
    whole = factor if stored == dtype else torch.empty((size, size), dtype=dtype, device=device)
    scales = torch.empty((size, 1), dtype=dtype, device=device)
    failed = torch.zeros((), dtype=torch.int32, device=device)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        rows = rows_of(start, stop).to(dtype)
        if start:
            before = whole[:start, start:stop] * scales[:start]
            rows.addmm_(before.T, whole[:start, start:], alpha=-1)
        corner, found = torch.linalg.cholesky_ex(rows[:, : stop - start], upper=True)
        failed += found.abs()
        diagonal = corner.diagonal()[:, None]
        scales[start:stop] = diagonal.square()
        done = whole[start:stop]
        done[:, start:stop] = (corner / diagonal).triu()
        done[:, stop:] = torch.linalg.solve_triangular(
            corner.T, rows[:, stop - start :], upper=False
        ).div_(diagonal)
        if whole is not factor:
            factor[start:stop, start:] = done[:, start:]
    return factor if int(failed) == 0 else None
