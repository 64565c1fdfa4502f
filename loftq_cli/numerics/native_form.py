"""tr(M H M^T) in C (kernels/form.c), in half the multiplications of M H.

Against the same in tensor operations it takes a tenth less time, and many times less on a busy
machine: its threads meet once for a matrix, not after every product.
"""

from __future__ import annotations

import ctypes

import torch

from loftq_cli.kernels import native

_TILE = 64  # columns; TILE in kernels/form.c
_GROUP = (
    528  # rows, a multiple of what pairs.h multiplies at once; more would not stay in the cache
)


class _Form(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("matrix", ctypes.c_void_p),
        ("moments", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
    )


def can_run(moments: torch.Tensor) -> bool:
    """Whether :func:`quadratic_form` takes such ``moments`` here."""
    return (
        moments.device.type == "cpu"
        and moments.dtype == torch.bfloat16
        and moments.dim() == 2
        and len(moments) % _TILE == 0
        and native.available()
        and bool(native.function("loftq_has_form")())
    )


def quadratic_form(matrix: torch.Tensor, moments: torch.Tensor) -> float:
    """tr(matrix @ moments @ matrix^T) of bfloat16 (out, in) and symmetric bfloat16 (in, in), which
    :func:`can_run`; summed in float32, over tiles in float64. Does not depend on the number of
    threads. Raises MemoryError."""
    matrix, moments = matrix.contiguous(), moments.contiguous()
    groups = -(-matrix.shape[0] // _GROUP)
    sums = torch.empty(groups, dtype=torch.float64)
    call = _Form(*matrix.shape, _GROUP, matrix.data_ptr(), moments.data_ptr(), sums.data_ptr())
    native.run("loftq_form", call, groups)
    return float(sums.sum())
