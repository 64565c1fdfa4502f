"""Error feedback in C (kernels/feedback.c): 64 rows at a time stay in the cache through all of
their columns, where tensor operations pass over memory for every step of every column."""

from __future__ import annotations

import ctypes

import torch

from loftq_cli.kernels import native
from loftq_cli.numerics.native_quantizer import Codebook, Uniform, codebook, uniform
from loftq_cli.numerics.quantizers.base import Quantizer
from loftq_cli.numerics.quantizers.blocks import Parameters
from loftq_cli.numerics.sweep import Product, Sweep

_ROWS = 64  # of a group; ROWS in kernels/feedback.c


class _Feedback(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("flattened", ctypes.c_int32),
        ("store", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("codebook", ctypes.POINTER(Codebook)),
        ("uniform", Uniform),
        ("rank", ctypes.c_int32),
        ("left", ctypes.c_void_p),
        ("right", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("half", ctypes.c_int32),
        ("factor", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("narrow", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
    )


def can_run(quantizer: Quantizer, factor: torch.Tensor) -> bool:
    """Whether :func:`requantize` takes such a quantizer and such a factor here."""
    if quantizer.search() is None or factor.device.type != "cpu" or not native.available():
        return False
    in_pairs = factor.dtype == torch.bfloat16 and native.function("loftq_feedback_in_pairs")()
    return bool(in_pairs) or factor.dtype == torch.float32


def requantize(
    sweep: Sweep,
    weight: torch.Tensor,
    parameters: Parameters,
    product: Product,
    order: torch.Tensor,
    factor: torch.Tensor,
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor, float]:
    """(codes uint8 (out, in), ||R||^2), as :func:`loftq_cli.numerics.feedback.requantize`, for what
    :func:`can_run`. Does not depend on the number of threads. Raises MemoryError."""
    rows, columns = weight.shape
    search = sweep.quantizer.search()
    assert search is not None, "a quantizer that the kernels cannot run"
    weight, factor = weight.contiguous(), factor.contiguous()
    left, right = product.left.contiguous(), product.right.T[order].contiguous()
    codes = torch.empty((rows, columns), dtype=torch.uint8)
    groups = -(-rows // _ROWS)
    sums = torch.empty(groups, dtype=torch.float64)
    table, zeros, book = search.table, parameters.zeros, None
    if table is not None:
        cell_code = table.cell_code.int()  # to be kept until the kernel is done
        book = ctypes.pointer(codebook(table, cell_code))
    call = _Feedback(
        rows=rows,
        columns=columns,
        size=search.block_size,
        flattened=table is not None,
        store=native.DTYPES[dtype or torch.float32],
        kind=native.DTYPES[weight.dtype],
        codebook=book,
        uniform=uniform(search),
        rank=left.shape[1],
        left=left.data_ptr(),
        right=right.data_ptr(),
        order=order.data_ptr(),
        half=factor.dtype == torch.bfloat16,
        factor=factor.data_ptr(),
        scales=parameters.scales.data_ptr(),
        zeros=None if zeros is None else zeros.data_ptr(),
        weight=weight.data_ptr(),
        residual=sweep.residual.data_ptr(),
        narrow=None if sweep.narrow is sweep.residual else sweep.narrow.data_ptr(),
        codes=codes.data_ptr(),
        sums=sums.data_ptr(),
    )
    native.run("loftq_feedback", call, groups)
    return codes, float(sums.sum())
