"""Quantizers as the kernels take them: what kernels/codebook.h and kernels/uniform.h define."""

from __future__ import annotations

import ctypes

import torch

from loftq_cli.numerics.quantizers.codebooks import Table
from loftq_cli.numerics.quantizers.grid import Search


class Codebook(ctypes.Structure):
    """The fields of the structure of this name."""

    _fields_ = (
        ("levels", ctypes.c_void_p),
        ("bounds", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("lowest", ctypes.c_float),
        ("per_cell", ctypes.c_float),
        ("cells", ctypes.c_int32),
        ("cell_code", ctypes.c_void_p),
        ("cell_bound", ctypes.c_void_p),
    )


class Uniform(ctypes.Structure):
    """The fields of the structure of this name."""

    _fields_ = (
        ("top", ctypes.c_int32),
        ("portable", ctypes.c_int32),
        ("symmetric", ctypes.c_int32),
    )


def codebook(table: Table, cell_code: torch.Tensor) -> Codebook:
    """``table`` for the kernels, which has to outlive the result, as ``cell_code`` has to: its
    codes of cells, int32."""
    return Codebook(
        levels=table.levels.data_ptr(),
        bounds=table.boundaries.data_ptr(),
        count=table.levels.numel(),
        lowest=table.lowest,
        per_cell=table.cells_per_unit,
        cells=cell_code.numel(),
        cell_code=cell_code.data_ptr(),
        cell_bound=table.cell_boundary.data_ptr(),
    )


def uniform(search: Search) -> Uniform:
    """The quantizer with zero points of ``search``."""
    return Uniform(2**search.bits - 1, search.portable, search.symmetric)
