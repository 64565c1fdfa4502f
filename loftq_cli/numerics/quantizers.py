"""Quantizers: a float32 matrix to N-bit codes with one scale (and zero point) per block.

What is stored and what it decodes to:

- ``CodebookQuantizer`` (nf, nf-symmetric, uniform-block): ``w = scale * levels[code]``, blocks of
  ``block_size`` over the row-major flattened matrix, the last one short (bitsandbytes' order).
- ``UniformQuantizer``: ``w = scale * (code - zero)``, groups of ``block_size`` along in_features,
  the last one of each row short (GPTQ's order). The scale is rounded to its storage dtype before
  the codes are chosen. The zero point is an integer in [1, 2**bits - 1]: GPTQ's format stores
  ``zero - 1``, and consumers disagree about what a stored -1 means.
- ``TensorUniformQuantizer``: one table of evenly spaced levels for the whole matrix.

Scales are ``absmax`` (the reference: largest magnitude, for uniform the min-max range) or ``mse``:
a coarse grid around absmax followed by least-squares steps, which keeps the storage and lowers the
squared error. A fit can start from the scales of the previous alternation step instead of the grid.

Everything works on row ranges whose elements are whole blocks (:func:`row_step`), so that a caller
streams a matrix through in pieces that stay in cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from loftq_cli.errors import ScaleRangeError
from loftq_cli.numerics.codebooks import decision_boundaries, evenly_spaced, normal_float

Scale = Literal["mse", "absmax"]

CHUNK_ELEMENTS = 1 << 19
"""Elements per piece on a CPU: a few float32 copies of it fit the second-level cache."""

_REFINEMENTS = 2  # least-squares steps after the grid
_CODEBOOK_GRID = (1.0, 0.9, 0.8, 0.7, 0.6)  # fractions of absmax
_UNIFORM_GRID = (1.0, 0.9, 0.8, 0.7, 0.6)  # fractions of the min-max range
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Parameters:
    """Per-block parameters as stored: ``scales`` float32 or float16 (blocks,), ``zeros`` uint8
    (blocks,) for affine decoding, else None."""

    scales: torch.Tensor
    zeros: torch.Tensor | None

    def __getitem__(self, blocks: slice) -> Parameters:
        return Parameters(self.scales[blocks], None if self.zeros is None else self.zeros[blocks])

    @staticmethod
    def join(parts: Sequence[Parameters]) -> Parameters:
        zeros = [part.zeros for part in parts if part.zeros is not None]
        scales = torch.cat([part.scales for part in parts])
        return Parameters(scales, torch.cat(zeros) if zeros else None)


@dataclass(frozen=True)
class Fitted:
    """A quantized range of rows: ``codes`` uint8 (rows, in), its parameters, and ``values``
    float32 (rows, in), what the codes decode to."""

    codes: torch.Tensor
    parameters: Parameters
    values: torch.Tensor


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix, independent of any file layout.

    ``codes`` uint8 (out, in); ``scales`` float32 or float16: (blocks,) over the flattened matrix
    with a codebook, (out * groups,) row by row with zero points; ``zeros`` uint8, same length, or
    None; ``levels`` float32 (2**bits,) or None. ``block_size`` 0 means one block for everything.
    """

    bits: int
    block_size: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    levels: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.codes.shape[0]), int(self.codes.shape[1])

    def decode(self) -> torch.Tensor:
        """The matrix Q, float32 (out, in)."""
        if self.levels is None:
            return self._decode_affine()
        flat = self.levels.take(self.codes.reshape(-1).long())
        return scale_blocks(flat, self.scales, self.block_size).view(self.shape)

    def _decode_affine(self) -> torch.Tensor:
        assert self.zeros is not None
        rows, columns = self.shape
        groups = block_count(columns, self.block_size)
        index = torch.arange(columns, device=self.codes.device) // self.block_size
        scales = self.scales.float().view(rows, groups)
        zeros = self.zeros.float().view(rows, groups)
        return (self.codes.float() - zeros[:, index]) * scales[:, index]


def scale_blocks(flat: torch.Tensor, scales: torch.Tensor, block_size: int) -> torch.Tensor:
    """Multiply each run of ``block_size`` elements of ``flat`` by its scale, the last run short."""
    count = flat.numel()
    if block_size == 0:
        return flat * scales.float()
    whole = count // block_size
    body = flat[: whole * block_size].view(whole, block_size) * scales[:whole, None].float()
    if whole * block_size == count:
        return body.view(-1)
    return torch.cat([body.view(-1), flat[whole * block_size :] * scales[whole].float()])


def block_count(count: int, block_size: int) -> int:
    """Blocks needed for ``count`` elements, the last one possibly short."""
    return 1 if block_size == 0 else -(-count // block_size)


class Quantizer(Protocol):
    """What the alternation needs of a quantizer."""

    def row_step(self, columns: int) -> int:
        """Row ranges handed to :meth:`fit` start at multiples of this."""

    def blocks_before(self, row: int, columns: int) -> int:
        """Blocks that lie before ``row`` (a multiple of :meth:`row_step`, or the last row)."""

    def prepare(self, pieces: Callable[[], Iterable[torch.Tensor]]) -> Quantizer:
        """The quantizer to use for one matrix, given its pieces (for whole-tensor statistics)."""

    def fit(self, rows: torch.Tensor, start: Parameters | None) -> Fitted:
        """Quantize float32 (rows, in), beginning the search at ``start`` where scales are
        searched for. Raises ScaleRangeError where a scale does not fit its storage dtype."""

    def assemble(self, codes: torch.Tensor, parameters: Parameters) -> Quantized:
        """The whole matrix from its concatenated parts."""


# -- codebook ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """A codebook with what a fast nearest-level search needs (see :func:`nearest`)."""

    levels: torch.Tensor
    boundaries: torch.Tensor
    cells: int
    lowest: float
    cell_code: torch.Tensor
    cell_boundary: torch.Tensor
    reciprocal: bool

    def to(self, device: torch.device) -> _Table:
        if self.levels.device == device:
            return self
        return replace(
            self,
            levels=self.levels.to(device),
            boundaries=self.boundaries.to(device),
            cell_code=self.cell_code.to(device),
            cell_boundary=self.cell_boundary.to(device),
        )


def make_table(levels: torch.Tensor, as_bitsandbytes: bool = False) -> _Table:
    """Divide the range of ``levels`` into equal cells with at most one decision boundary each.

    ``as_bitsandbytes`` decides ties as its quantizer does, so that codes agree to the last bit:
    at the rounded midpoints of the levels, and after multiplying by the scale's reciprocal. Both
    differ from argmin over ``|x / scale - level|`` by one unit in the last place, if at all.

    Where a cell's boundary is, and which code applies below it, are two table look-ups; the
    search then costs the same at any width, and rounding cannot matter: the cell index is a
    monotone function of x, and inside a boundary's cell x is compared with the boundary itself.
    """
    boundaries = (levels[:-1] + levels[1:]) / 2 if as_bitsandbytes else decision_boundaries(levels)
    lowest = float(levels[0])
    cells = 64
    index = _cell_index(boundaries, lowest, cells)
    while not bool((index.diff() > 0).all()):
        cells *= 2
        if cells > 1 << 16:
            raise ValueError("codebook levels are too close together")
        index = _cell_index(boundaries, lowest, cells)
    cell_boundary = torch.full((cells,), float("inf"))
    cell_boundary[index] = boundaries
    occupied = torch.zeros(cells, dtype=torch.int64)
    occupied[index] = 1
    cell_code = (occupied.cumsum(0) - occupied).to(torch.uint8)
    return _Table(
        levels, boundaries, cells, lowest, cell_code, cell_boundary, reciprocal=as_bitsandbytes
    )


def _cell_index(x: torch.Tensor, lowest: float, cells: int) -> torch.Tensor:
    # The range is at most [-|lowest|, 1]; what lies outside it saturates into the outer cells.
    position = (x - lowest) * (cells / (1.0 - lowest))
    return position.clamp_(0, cells - 1).to(torch.int64)


def nearest(x: torch.Tensor, table: _Table) -> torch.Tensor:
    """Index of the nearest level, ties to the lower one: uint8, the shape of ``x``."""
    if table.levels.numel() == 4:
        code = (x > table.boundaries[0]).view(torch.uint8)
        for boundary in table.boundaries[1:]:
            code.add_((x > boundary).view(torch.uint8))
        return code
    index = _cell_index(x, table.lowest, table.cells)
    code = table.cell_code.take(index)
    return code.add_((x > table.cell_boundary.take(index)).view(torch.uint8))


@functools.cache
def _named_table(method: str, bits: int) -> _Table:
    if method == "uniform-block":
        return make_table(evenly_spaced(bits))
    symmetric = method == "nf-symmetric"
    return make_table(normal_float(bits, symmetric), as_bitsandbytes=bits == 4 and not symmetric)


@dataclass(frozen=True)
class CodebookQuantizer:
    """``scale * levels[code]`` in blocks over the row-major flattened matrix."""

    table: _Table
    bits: int
    block_size: int
    scale: Scale | Literal["spread"]

    def row_step(self, columns: int) -> int:
        return 1 if self.block_size == 0 else self.block_size // math.gcd(columns, self.block_size)

    def blocks_before(self, row: int, columns: int) -> int:
        return block_count(row * columns, self.block_size) if row else 0

    def prepare(self, pieces: Callable[[], Iterable[torch.Tensor]]) -> Quantizer:
        return self

    def fit(self, rows: torch.Tensor, start: Parameters | None) -> Fitted:
        flat = rows.reshape(-1)
        size = self.block_size
        whole = flat.numel() // size * size
        count = whole // size
        table = self.table.to(rows.device)
        parts = []
        for blocks, index in (
            (flat[:whole].view(count, size), slice(0, count)),
            (flat[whole:].view(1, -1), slice(count, None)),  # the short last block
        ):
            if blocks.numel():
                begin = None if start is None else start.scales[index]
                parts.append(self._fit(blocks, table, begin))
        codes, scales, values = (
            torch.cat([part.reshape(-1) for part in column]) if len(column) > 1 else column[0]
            for column in zip(*parts, strict=True)
        )
        return Fitted(
            codes.view(rows.shape), Parameters(scales.view(-1), None), values.view(rows.shape)
        )

    def _fit(
        self, blocks: torch.Tensor, table: _Table, begin: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(codes, scales, values) of float32 ``blocks`` (count, size)."""
        if self.scale == "spread":
            # The reference code's block-wise uniform: mean + 2.5 standard deviations.
            spread = blocks.std(dim=1) if blocks.shape[1] > 1 else blocks.new_zeros(len(blocks))
            scales = blocks.mean(dim=1) + 2.5 * spread
            unit = _divide(blocks, scales)
        else:
            scales = blocks.abs().amax(dim=1)
            divide = _multiply_reciprocal if table.reciprocal else _divide
            unit = divide(blocks, scales)
            if self.scale == "mse":
                if begin is None:
                    relative = self._search(unit, table)
                else:  # clamped: at a scale far too large every code would be zero for good
                    relative = (begin / _nonzero(scales)).clamp_max_(2.0)
                for _ in range(_REFINEMENTS):
                    relative = self._refine(unit, table, relative)
                scales = scales * relative
                unit = unit.div_(_nonzero(relative)[:, None])
        codes = nearest(unit, table)
        values = table.levels.take(codes.long()) * scales[:, None]
        return codes, scales, values

    def _search(self, unit: torch.Tensor, table: _Table) -> torch.Tensor:
        """Of a grid of scales, the least-squares scale of the codes that fit best."""
        best = unit.new_ones(len(unit))
        best_gain = unit.new_zeros(len(unit))
        for fraction in _CODEBOOK_GRID:
            scales = torch.full_like(best, fraction)
            numerator, denominator = self._products(unit, table, scales)
            gain = _ratio(numerator.square(), denominator)
            better = (gain > best_gain) & (numerator > 0)
            best = torch.where(better, _ratio(numerator, denominator), best)
            best_gain = torch.where(better, gain, best_gain)
        return best

    def _refine(self, unit: torch.Tensor, table: _Table, scales: torch.Tensor) -> torch.Tensor:
        numerator, denominator = self._products(unit, table, scales)
        return torch.where(numerator > 0, _ratio(numerator, denominator), scales)

    def _products(
        self, unit: torch.Tensor, table: _Table, scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """<x, q> and <q, q> per block, where q are the levels chosen at ``scales``."""
        levels = table.levels.take(nearest(unit / _nonzero(scales)[:, None], table).long())
        return torch.linalg.vecdot(unit, levels), torch.linalg.vecdot(levels, levels)

    def assemble(self, codes: torch.Tensor, parameters: Parameters) -> Quantized:
        levels = self.table.levels.to(codes.device)
        return Quantized(self.bits, self.block_size, codes, parameters.scales, None, levels)


# -- uniform -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UniformQuantizer:
    """``scale * (code - zero)`` in groups along in_features; ``scale_dtype`` is what is stored."""

    bits: int
    block_size: int
    scale: Scale
    scale_dtype: torch.dtype = torch.float32

    def row_step(self, columns: int) -> int:
        return 1

    def blocks_before(self, row: int, columns: int) -> int:
        return row * block_count(columns, self.block_size)

    def prepare(self, pieces: Callable[[], Iterable[torch.Tensor]]) -> Quantizer:
        return self

    def fit(self, rows: torch.Tensor, start: Parameters | None) -> Fitted:
        count, columns = rows.shape
        size = self.block_size
        groups = block_count(columns, size)
        whole = columns // size
        codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
        values = torch.empty_like(rows)
        scales = torch.empty((count, groups), dtype=self.scale_dtype, device=rows.device)
        zeros = torch.empty((count, groups), dtype=torch.uint8, device=rows.device)
        for first, last, width in ((0, whole, size), (whole, groups, columns - whole * size)):
            if first == last:
                continue
            blocks = rows[:, first * size : first * size + (last - first) * width]
            begin = None
            if start is not None and start.zeros is not None:
                begin = tuple(
                    column.view(count, groups)[:, first:last].reshape(-1).float()
                    for column in (start.scales, start.zeros)
                )
            part = self._fit(blocks.reshape(-1, width), begin)
            area = (slice(None), slice(first * size, first * size + (last - first) * width))
            codes[area] = part.codes.view(count, -1)
            values[area] = part.values.view(count, -1)
            scales[:, first:last] = part.parameters.scales.view(count, -1)
            assert part.parameters.zeros is not None
            zeros[:, first:last] = part.parameters.zeros.view(count, -1)
        return Fitted(codes, Parameters(scales.view(-1), zeros.view(-1)), values)

    def _fit(self, blocks: torch.Tensor, begin: tuple[torch.Tensor, ...] | None) -> Fitted:
        top = 2**self.bits - 1
        absmax = blocks.abs().amax(dim=1)
        unit = _divide(blocks, absmax)
        if begin is not None and self.scale == "mse":
            # Clamped: at a scale far too large every code would be zero for good.
            relative, zeros = (begin[0] / _nonzero(absmax)).clamp_max_(1.0), begin[1]
        else:
            relative, zeros = self._search(unit, top)
        if self.scale == "mse":
            for _ in range(_REFINEMENTS):
                offsets = self._offsets(unit, relative, zeros, top)
                numerator = torch.linalg.vecdot(unit, offsets)
                fitted = _ratio(numerator, torch.linalg.vecdot(offsets, offsets))
                relative = torch.where(numerator > 0, fitted, relative)
        scales = (relative * absmax).to(self.scale_dtype)
        if self.scale_dtype == torch.float16:
            lost = torch.isinf(scales) | ((scales == 0) & (absmax > 0))
            if bool(lost.any()):
                raise ScaleRangeError("a group's scale does not fit float16")
        stored = scales.float()
        offsets = self._offsets(blocks, stored, zeros, top)
        codes = (offsets + zeros[:, None]).to(torch.uint8)
        parameters = Parameters(scales, zeros.to(torch.uint8))
        return Fitted(codes, parameters, offsets.mul_(stored[:, None]))

    @staticmethod
    def _offsets(
        blocks: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int
    ) -> torch.Tensor:
        """code - zero, as float32, of every element."""
        offsets = (blocks / _nonzero(scales)[:, None]).round_()
        return offsets.clamp_(-zeros[:, None], top - zeros[:, None])

    def _search(self, unit: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(scales, zeros) relative to ``unit``: min-max rounded to the nearest zero point for
        absmax; for mse the best of a grid, with the zero point on either side."""
        low = unit.amin(dim=1).clamp_max_(0)
        high = unit.amax(dim=1).clamp_min_(0)
        width = high - low
        position = -low * top / _nonzero(width)
        best_zeros = position.round()
        # Zero point 0 is not used: where it would be nearest, widen the steps to keep the range.
        best = torch.where((best_zeros < 1) & (high > 0), high / max(top - 1, 1), width / top)
        best_zeros = best_zeros.clamp_(1, top)
        if self.scale == "absmax":
            return best, best_zeros
        step = best
        best_gain = torch.zeros_like(best)
        for zeros in (position.floor().clamp_(1, top), position.ceil().clamp_(1, top)):
            for fraction in _UNIFORM_GRID:
                offsets = self._offsets(unit, step * fraction, zeros, top)
                numerator = torch.linalg.vecdot(unit, offsets)
                denominator = torch.linalg.vecdot(offsets, offsets)
                gain = _ratio(numerator.square(), denominator)
                better = (gain > best_gain) & (numerator > 0)
                best = torch.where(better, _ratio(numerator, denominator), best)
                best_zeros = torch.where(better, zeros, best_zeros)
                best_gain = torch.where(better, gain, best_gain)
        return best, best_zeros

    def assemble(self, codes: torch.Tensor, parameters: Parameters) -> Quantized:
        return Quantized(self.bits, self.block_size, codes, parameters.scales, parameters.zeros)


@dataclass(frozen=True)
class TensorUniformQuantizer:
    """The LoftQ reference code's per-tensor uniform (its DeBERTa results): evenly spaced levels
    between the minimum and maximum of the matrix clipped to mean +- 2 standard deviations."""

    bits: int
    levels: torch.Tensor | None = None
    block_size: int = 0

    def row_step(self, columns: int) -> int:
        return 1

    def blocks_before(self, row: int, columns: int) -> int:
        return 0 if row == 0 else 1

    def prepare(self, pieces: Callable[[], Iterable[torch.Tensor]]) -> Quantizer:
        count, total, squares = 0, 0.0, 0.0
        low, high = math.inf, -math.inf
        for piece in pieces():
            wide = piece.double()
            count += wide.numel()
            total += float(wide.sum())
            squares += float(wide.square().sum())
            low, high = min(low, float(piece.min())), max(high, float(piece.max()))
        mean = total / count
        variance = max(squares - count * mean * mean, 0.0) / max(count - 1, 1)
        reach = 2 * math.sqrt(variance)
        levels = torch.linspace(
            max(low, mean - reach), min(high, mean + reach), 2**self.bits, dtype=torch.float64
        )
        return replace(self, levels=levels.float())

    def fit(self, rows: torch.Tensor, start: Parameters | None) -> Fitted:
        assert self.levels is not None
        levels = self.levels.to(rows.device)
        spacing = (levels[-1] - levels[0]) / (len(levels) - 1)
        position = (rows - levels[0]) / torch.where(spacing == 0, torch.ones_like(spacing), spacing)
        codes = position.round_().clamp_(0, len(levels) - 1).to(torch.uint8)
        scales = torch.ones(1, dtype=torch.float32, device=rows.device)
        return Fitted(codes, Parameters(scales, None), levels.take(codes.long()))

    def assemble(self, codes: torch.Tensor, parameters: Parameters) -> Quantized:
        assert self.levels is not None
        levels = self.levels.to(codes.device)
        return Quantized(self.bits, 0, codes, parameters.scales[:1], None, levels)


def make_quantizer(
    method: str, bits: int, block_size: int, scale: Scale, scale_dtype: torch.dtype = torch.float32
) -> Quantizer:
    """The quantizer of a method name; ``scale_dtype`` concerns ``uniform`` only."""
    if method == "uniform":
        return UniformQuantizer(bits, block_size, scale, scale_dtype)
    if method == "uniform-tensor":
        return TensorUniformQuantizer(bits)
    rule: Scale | Literal["spread"] = "spread" if method == "uniform-block" else scale
    return CodebookQuantizer(_named_table(method, bits), bits, block_size, rule)


# -- helpers -------------------------------------------------------------------------------------


def _nonzero(scales: torch.Tensor) -> torch.Tensor:
    """``scales`` with 1 for 0: the divisor of an all-zero block."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _divide(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return blocks / _nonzero(scales)[:, None]


def _multiply_reciprocal(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    divisor = _nonzero(scales)
    unit = blocks * divisor.reciprocal()[:, None]
    tiny = divisor < _TINY  # the reciprocal of a subnormal may overflow
    if bool(tiny.any()):
        unit[tiny] = blocks[tiny] / divisor[tiny, None]
    return unit


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    return numerator / denominator.clamp_min(_TINY)
