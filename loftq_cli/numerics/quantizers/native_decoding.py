"""Decoding in C (kernels/dequantize.c), for plain tensors on the CPU: each block's values are
tabulated and looked up in one pass. The bits are those of decoding.py's tensor operations."""

from __future__ import annotations

import ctypes

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from loftq_cli.checkpoint.packing import packed_length
from loftq_cli.kernels import native
from loftq_cli.numerics.quantizers import trellis_code
from loftq_cli.numerics.quantizers.blocks import block_count
from loftq_cli.numerics.quantizers.packed import Packed

_PIECE = 4096  # elements; what one block for the whole matrix is divided into
_ONE_THREAD = 1 << 17  # elements: below, a second thread costs what it saves


class _Call(ctypes.Structure):
    _fields_ = (
        ("columns", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("scale_step", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("store", ctypes.c_int32),
        ("packed", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    )


class _Trellis(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("store", ctypes.c_int32),
        ("packed", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("alone", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    )


def decode(packed: Packed, dtype: torch.dtype) -> torch.Tensor | None:
    """As :func:`loftq_cli.numerics.quantizers.decoding.decode`; None if the kernels cannot do it,
    or must not: they read memory, which a tensor that is traced or only described does not have."""
    tensors = (packed.codes, packed.scales, packed.zeros, packed.levels)
    if dtype not in native.DTYPES or not all(_plain(each) for each in tensors if each is not None):
        return None
    if _traced() or not native.available():
        return None
    if packed.is_trellis:
        return _decode_trellis(packed, dtype)
    count, size = packed.elements, packed.block_size or _PIECE
    columns = count if packed.zeros is None else packed.shape[1]
    rows = 1 if packed.zeros is None else packed.shape[0]
    blocks = rows * block_count(columns, size)
    if not _is_complete(packed, blocks):
        return None
    scales = packed.scales.float().contiguous()
    out = torch.empty(packed.shape, dtype=dtype, device="cpu")
    call = _Call(
        columns=columns,
        size=size,
        scale_step=1 if packed.block_size else 0,
        bits=packed.bits,
        store=native.DTYPES[dtype],
        packed=packed.codes.data_ptr(),
        scales=scales.data_ptr(),
        levels=None if packed.levels is None else packed.levels.data_ptr(),
        zeros=None if packed.zeros is None else packed.zeros.data_ptr(),
        out=out.data_ptr(),
    )
    threads = 1 if count < _ONE_THREAD else native.team(blocks)
    native.function("loftq_dequantize")(
        ctypes.byref(call), ctypes.c_int64(blocks), ctypes.c_int32(threads)
    )
    return out


def _decode_trellis(packed: Packed, dtype: torch.dtype) -> torch.Tensor | None:
    rows, columns = packed.shape
    size, levels, alone = packed.block_size, packed.levels, packed.alone
    assert levels is not None
    assert alone is not None
    complete = (
        packed.elements > 0
        and size > 0
        and packed.scales.numel() == block_count(packed.elements, size)
        and _holds(packed.codes, torch.uint8, packed_length(packed.elements, packed.bits))
        and _holds(levels, torch.float32, 1 << trellis_code.WINDOW)
    )
    if not complete:
        return None
    scales, choice = packed.scales.float().contiguous(), levels[alone]
    out = torch.empty(packed.shape, dtype=dtype, device="cpu")
    call = _Trellis(
        rows=rows,
        columns=columns,
        size=size,
        store=native.DTYPES[dtype],
        packed=packed.codes.data_ptr(),
        scales=scales.data_ptr(),
        levels=levels.data_ptr(),
        alone=choice.data_ptr(),
        out=out.data_ptr(),
    )
    threads = 1 if packed.elements < _ONE_THREAD else native.team(packed.elements // _PIECE)
    native.function("loftq_dequantize_trellis")(ctypes.byref(call), ctypes.c_int32(threads))
    return out


def _is_complete(packed: Packed, blocks: int) -> bool:
    """Whether all that the kernels would read is there."""
    count, bits, zeros, levels = packed.elements, packed.bits, packed.zeros, packed.levels
    return (
        count > 0
        and bits in (2, 3, 4, 8)
        and _holds(packed.codes, torch.uint8, packed_length(count, bits))
        and packed.scales.numel() == (blocks if packed.block_size else 1)
        and (zeros is None) != (levels is None)
        and (zeros is None or packed.block_size > 0)
        and (zeros is None or _holds(zeros, torch.uint8, packed_length(blocks, bits)))
        and (levels is None or _holds(levels, torch.float32, 2**bits))
    )


def _traced() -> bool:
    """Whether operations of this thread are recorded or replaced: what the kernels do would be
    missed."""
    # Not is_in_torch_dispatch_mode(): it is one flag for all threads, and modes of two threads that
    # overlap leave it set for good.
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return _get_current_dispatch_mode() is not None or bool(tracing)


def _plain(tensor: torch.Tensor) -> bool:
    """Whether it is memory of this process, and nothing waits for its gradient."""
    kind = type(tensor)
    known = kind is torch.Tensor or kind is torch.nn.Parameter
    return known and tensor.device.type == "cpu" and not tensor.requires_grad


def _holds(tensor: torch.Tensor, dtype: torch.dtype, count: int) -> bool:
    return tensor.dtype == dtype and tensor.numel() >= count and tensor.is_contiguous()
