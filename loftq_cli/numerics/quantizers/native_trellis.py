"""The trellis code's search in C (kernels/trellis.c): of rings, and of the columns of a panel, each
after the errors of those before."""

from __future__ import annotations

import ctypes

import torch

from loftq_cli.kernels import native
from loftq_cli.numerics.quantizers.trellis_code import SEQUENCE, alone, levels

_PANEL = 64  # PANEL in kernels/trellis.c


class _Rings(ctypes.Structure):
    _fields_ = (
        ("length", ctypes.c_int64),
        ("wanted", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
    )


class _Panel(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("store", ctypes.c_int32),
        ("targets", ctypes.c_void_p),
        ("added", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("alone", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    )


def search(wanted: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes uint8 (rings, length), as viterbi.py's search in tensor operations finds them, on the
    device of ``wanted``. Raises MemoryError."""
    device, table = wanted.device, levels(torch.device("cpu"))
    wanted, scales = wanted.cpu().contiguous(), scales.cpu().contiguous()
    codes = torch.empty(wanted.shape, dtype=torch.uint8)
    call = _Rings(
        length=wanted.shape[1],
        wanted=wanted.data_ptr(),
        scales=scales.data_ptr(),
        levels=table.data_ptr(),
        codes=codes.data_ptr(),
    )
    native.run("loftq_trellis", call, len(wanted))
    return codes.to(device)


def quantize_panel(
    targets: torch.Tensor,
    added: torch.Tensor,
    factor: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8, values float32) of ``targets`` float32 (columns, out), at most 64 columns, as
    feedback.py's panels in tensor operations; ``zeros`` is None. Does not depend on the number of
    threads. Raises MemoryError."""
    assert len(targets) <= _PANEL, "more columns than the kernel has room for"
    given = [each.cpu().contiguous() for each in (targets, added, factor, scales)]
    device, (columns, rows) = targets.device, targets.shape
    codes = torch.empty((columns, rows), dtype=torch.uint8)
    values = torch.empty((columns, rows))
    table = levels(torch.device("cpu"))
    choice = table[alone(torch.device("cpu"))]
    call = _Panel(
        rows=rows,
        columns=columns,
        store=native.DTYPES[dtype or torch.float32],
        targets=given[0].data_ptr(),
        added=given[1].data_ptr(),
        factor=given[2].data_ptr(),
        scales=given[3].data_ptr(),
        levels=table.data_ptr(),
        alone=choice.data_ptr(),
        codes=codes.data_ptr(),
        values=values.data_ptr(),
    )
    native.run("loftq_trellis_panel", call, -(-rows // SEQUENCE))
    return codes.to(device), values.to(device)
