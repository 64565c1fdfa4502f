"""Sweeps in C (kernels/sweep.c): a group of rows stays in the cache through subtraction of the
previous product, scale search, quantization and the new residual. Written in tensor operations each
of these is several passes over memory; this is 10 to 40 times faster."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch

from loftq_cli.errors import ScaleRangeError
from loftq_cli.kernels import native
from loftq_cli.numerics.native_quantizer import Codebook, Uniform, codebook, uniform
from loftq_cli.numerics.quantizers.base import Quantizer
from loftq_cli.numerics.quantizers.blocks import Fitted, Parameters, block_count
from loftq_cli.numerics.quantizers.grid import REFINEMENTS, grid
from loftq_cli.numerics.quantizers.scale_storage import Stored
from loftq_cli.numerics.sweep import Product, Swept, stored_parameters, target_of

_TILE = 64  # columns; TILE in kernels/product.h
_ROWS = 16  # of a group, so that a tile of A is used often enough
_BUFFER_ELEMENTS = 1 << 18  # of a group's targets: 1 MiB
_SCALE_LOST = 2  # what kernels/sweep.c returns


class _Search(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_void_p),
        ("grid_size", ctypes.c_int32),
        ("refinements", ctypes.c_int32),
    )


class _Sweep(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("flattened", ctypes.c_int32),
        ("store", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("codebook", ctypes.POINTER(Codebook)),
        ("uniform", Uniform),
        ("search", _Search),
        ("rank", ctypes.c_int32),
        ("left", ctypes.c_void_p),
        ("tiles", ctypes.c_void_p),
        ("beyond", ctypes.c_float),
        ("before_rank", ctypes.c_int32),
        ("before_left", ctypes.c_void_p),
        ("before_tiles", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("narrow", ctypes.c_void_p),
        ("remains", ctypes.c_void_p),
        ("half_remains", ctypes.c_int32),
        ("start", ctypes.c_void_p),
        ("fixed", ctypes.c_int32),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
    )


class NativeSweep:
    """The passes over one matrix on the CPU; see :class:`loftq_cli.numerics.sweep.Sweep`.

    The result does not depend on the number of threads: groups are independent, their sums are
    added in order.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        quantizer: Quantizer,
        products: torch.dtype,
        backbone_dtype: torch.dtype | None,
        scale_dtype: Stored = "float32",
    ) -> None:
        self._scale_dtype: Stored = scale_dtype
        self._weight = weight.contiguous()
        self.quantizer = quantizer
        self._store = native.DTYPES[backbone_dtype or torch.float32]
        self.residual = torch.empty_like(self._weight, dtype=torch.float32)
        half = products == torch.bfloat16
        self.narrow = torch.empty_like(self._weight, dtype=products) if half else self.residual
        self.remains: torch.Tensor | None = None
        columns = weight.shape[1]
        unit = quantizer.row_step(columns)
        wanted = min(_ROWS, max(_BUFFER_ELEMENTS // columns, 1))
        self._group = max(wanted // unit, 1) * unit

    def quantize(self, start: Parameters | None, product: Product | None) -> Swept:
        weight = self._weight
        self.quantizer = self.quantizer.prepare(
            [slice(0, weight.shape[0])], lambda rows: target_of(weight, product, rows), _fit
        )
        swept = self._quantize(start, product)
        if self._scale_dtype == "float32":
            return swept
        given, previous = stored_parameters(swept.quantized, self._scale_dtype), swept.previous
        del swept  # its codes
        return replace(self._quantize(given, product, fixed=True), previous=previous)

    def _quantize(
        self, start: Parameters | None, product: Product | None, *, fixed: bool = False
    ) -> Swept:
        """``fixed``: at the parameters in ``start``, instead of beside its scales."""
        weight = self._weight
        rows, columns = weight.shape
        search = self.quantizer.search()
        assert search is not None, "a quantizer that the kernels cannot run"
        table = search.table
        runs = (rows, columns) if table is None else (1, rows * columns)
        blocks = runs[0] * block_count(runs[1], search.block_size)
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        scales = torch.empty(blocks)
        zeros = torch.empty(blocks, dtype=torch.uint8) if table is None else None
        if fixed:
            assert start is not None
            zeros = start.zeros
        begin = None if start is None else start.scales
        mirrored = table is not None and not table.symmetric
        multiples = torch.tensor(grid(search.bits, warm=start is not None, mirrored=mirrored))
        book = None
        if table is not None:
            cell_code = table.cell_code.int()  # to be kept until the kernel is done
            book = codebook(table, cell_code)
        call = _Sweep(
            size=search.block_size,
            flattened=table is not None,
            store=self._store,
            codebook=None if book is None else ctypes.pointer(book),
            uniform=uniform(search),
            search=_Search(multiples.data_ptr(), multiples.numel(), REFINEMENTS),
            narrow=None if self.narrow is self.residual else self.narrow.data_ptr(),
            start=None if begin is None else begin.data_ptr(),
            fixed=fixed,
            codes=codes.data_ptr(),
            scales=scales.data_ptr(),
            zeros=None if zeros is None else zeros.data_ptr(),
        )
        before, after = self._run(call, product)
        parameters = Parameters(scales, zeros)
        return Swept(self.quantizer.assemble(codes, parameters), after, before)

    def remainder(self, product: Product) -> float:
        before, _ = self._run(_Sweep(), product)
        return before

    def _run(self, call: _Sweep, product: Product | None) -> tuple[float, float]:
        """The two sums of squares, over all groups."""
        weight = self._weight
        call.rows, call.columns = weight.shape
        call.group = self._group
        call.kind = native.DTYPES[weight.dtype]
        call.weight, call.residual = weight.data_ptr(), self.residual.data_ptr()
        if self.remains is not None and not call.fixed:  # the second pass finds another R
            call.remains = self.remains.data_ptr()
            call.half_remains = self.remains.dtype == torch.bfloat16
        if product is not None:
            left, tiles = product.left.contiguous(), _tiles(product.right)
            call.rank = left.shape[1]
            call.left, call.tiles = left.data_ptr(), tiles.data_ptr()
            call.beyond = product.beyond
        if product is not None and product.before is not None:
            earlier = product.before.left.contiguous(), _tiles(product.before.right)
            call.before_rank = earlier[0].shape[1]
            call.before_left, call.before_tiles = (part.data_ptr() for part in earlier)
        groups = -(-call.rows // call.group)
        sums = torch.empty((groups, 2), dtype=torch.float64)
        call.sums = sums.data_ptr()
        lost = ScaleRangeError("a group's scale does not fit float16")
        native.run("loftq_sweep", call, groups, {_SCALE_LOST: lost})
        before, after = sums.sum(dim=0).tolist()
        return before, after


def _fit(quantizer: Quantizer, rows: torch.Tensor, start: Parameters | None) -> Fitted:
    """As ``quantizer.fit``."""
    sweep = NativeSweep(rows, quantizer, torch.float32, None)
    quantized = sweep._quantize(start, None).quantized
    parameters = Parameters(quantized.scales, quantized.zeros)
    return Fitted(quantized.codes, parameters, rows - sweep.residual)


def _tiles(right: torch.Tensor) -> torch.Tensor:
    """(rank, columns) as kernels/product.h reads it: [tile][rank][64], padded with zeros."""
    rank, columns = right.shape
    padded = torch.nn.functional.pad(right, (0, -columns % _TILE))
    return padded.view(rank, -1, _TILE).transpose(0, 1).contiguous()
