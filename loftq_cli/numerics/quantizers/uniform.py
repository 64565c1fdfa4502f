"""Quantizers with evenly spaced levels: ``scale * (code - zero)``, and one table per matrix.

The zero point is chosen, or fixed in the middle, at 2^(bits - 1) (``symmetric``): then one code
lies below it more than above, and a scale of either sign says which side of a group that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from loftq_cli.errors import ScaleRangeError
from loftq_cli.numerics.quantizers.blocks import (
    TINY,
    Fit,
    Fitted,
    Parameters,
    Quantized,
    block_count,
    divide,
    nonzero,
    ratio,
)
from loftq_cli.numerics.quantizers.grid import LARGEST_BLOCK, REFINEMENTS, Search, grid
from loftq_cli.numerics.quantizers.portable import portable


@dataclass(frozen=True)
class UniformQuantizer:
    """``scale * (code - zero)`` in groups along in_features.

    ``portable``: scales are rounded to portable ones as they are fitted. ``symmetric``: the zero
    point is 2**(bits - 1). ``native``: on a CPU the compiled kernels may search.
    """

    bits: int
    block_size: int
    scale: Literal["mse", "absmax"]
    portable: bool = False
    symmetric: bool = False
    native: bool = False

    def row_step(self, columns: int) -> int:
        return 1

    def blocks_before(self, row: int, columns: int) -> int:
        return row * block_count(columns, self.block_size)

    def prepare(
        self, pieces: Sequence[slice], target: Callable[[slice], torch.Tensor], fit: Fit
    ) -> UniformQuantizer:
        return self

    def search(self) -> Search | None:
        if not self.native or self.scale != "mse" or self.block_size > LARGEST_BLOCK:
            return None
        return Search(self.bits, self.block_size, None, self.portable, self.symmetric)

    def fit(self, rows: torch.Tensor, start: Parameters | None) -> Fitted:
        count, columns = rows.shape
        groups = block_count(columns, self.block_size)
        codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
        values = torch.empty_like(rows)
        scales = torch.empty((count, groups), device=rows.device)
        zeros = torch.empty((count, groups), dtype=torch.uint8, device=rows.device)
        for area, chosen, width in self._areas(columns):
            begin = None
            if start is not None:
                begin = start.scales.view(count, groups)[:, chosen].reshape(-1)
            part = self._fit(rows[:, area].reshape(-1, width), begin)
            codes[:, area] = part.codes.view(count, -1)
            values[:, area] = part.values.view(count, -1)
            scales[:, chosen] = part.parameters.scales.view(count, -1)
            assert part.parameters.zeros is not None
            zeros[:, chosen] = part.parameters.zeros.view(count, -1)
        return Fitted(codes, Parameters(scales.view(-1), zeros.view(-1)), values)

    def encode(self, rows: torch.Tensor, parameters: Parameters) -> Fitted:
        count, columns = rows.shape
        assert parameters.zeros is not None
        all_scales = parameters.scales.view(count, -1)
        all_zeros = parameters.zeros.view(count, -1)
        codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
        values = torch.empty_like(rows)
        for area, chosen, width in self._areas(columns):
            scales = all_scales[:, chosen].reshape(-1)
            zeros = all_zeros[:, chosen].reshape(-1).float()
            blocks = rows[:, area].reshape(-1, width)
            part_codes, part_values = self.encode_at(blocks, scales[:, None], zeros[:, None])
            codes[:, area] = part_codes.view(count, -1)
            values[:, area] = part_values.view(count, -1)
        return Fitted(codes, parameters, values)

    def encode_at(
        self, x: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert zeros is not None
        offsets = self._offsets(x, scales, zeros, 2**self.bits - 1)
        return (offsets + zeros).to(torch.uint8), offsets.mul_(scales)

    def block_index(self, rows: slice, chosen: torch.Tensor, columns: int) -> torch.Tensor:
        groups = block_count(columns, self.block_size)
        first = torch.arange(rows.start, rows.stop, device=chosen.device) * groups
        return (chosen // self.block_size)[:, None] + first

    def _areas(self, columns: int) -> list[tuple[slice, slice, int]]:
        """(columns, numbers within a row, width) of the whole groups, and of the short last one
        if there is one."""
        size = self.block_size
        whole = columns // size
        body = slice(0, whole * size), slice(0, whole), size
        rest = slice(whole * size, columns), slice(whole, whole + 1), columns - whole * size
        return [area for area in (body, rest) if area[0].start < area[0].stop]

    def _fit(self, blocks: torch.Tensor, begin: torch.Tensor | None) -> Fitted:
        top = 2**self.bits - 1
        absmax = blocks.abs().amax(dim=1)
        unit = divide(blocks, absmax)
        # At a scale far too large every code would stay at zero.
        carried = None if begin is None else (begin.abs() / nonzero(absmax)).clamp_max_(1.0)
        search = self._search_symmetric if self.symmetric else self._search
        relative, zeros = search(unit, top, carried)
        scales = self._stored(relative * absmax, absmax)
        codes, values = self.encode_at(blocks, scales[:, None], zeros[:, None])
        return Fitted(codes, Parameters(scales, zeros.to(torch.uint8)), values)

    def _stored(self, scales: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        """``scales`` as they are stored. Raises ScaleRangeError."""
        if not self.portable:
            return scales
        stored = portable(scales)
        lost = torch.isinf(stored) | ((stored == 0) & (absmax > 0))
        if bool(lost.any()):
            raise ScaleRangeError("a group's scale does not fit float16")
        return stored

    @staticmethod
    def _offsets(
        x: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int
    ) -> torch.Tensor:
        """code - zero, as float32, of every element."""
        return (x / nonzero(scales)).round_().clamp_(-zeros, top - zeros)

    def _search(
        self, unit: torch.Tensor, top: int, carried: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(scales, zeros) relative to ``unit``: min-max rounded to the nearest zero point for
        absmax; for mse the best of a grid, with the zero point on either side, refined.

        ``carried``: the magnitudes of the previous step's scales, at most 1.
        """
        low = unit.amin(dim=1).clamp_max_(0)
        high = unit.amax(dim=1).clamp_min_(0)
        width = high - low
        position = -low * top / nonzero(width)
        best_zeros = position.round()
        # Zero point 0 is not used: where it would be nearest, widen the steps to keep the range.
        best = torch.where((best_zeros < 1) & (high > 0), high / max(top - 1, 1), width / top)
        best_zeros = best_zeros.clamp_(1, top)
        if self.scale == "absmax":
            return best, best_zeros
        base = best if carried is None else torch.where(carried > TINY, carried, best)
        best, best_gain = base, torch.zeros_like(base)
        for zeros in (position.floor().clamp_(1, top), position.ceil().clamp_(1, top)):
            for multiple in grid(self.bits, warm=carried is not None):
                numerator, denominator = self._products(unit, base * multiple, zeros, top)
                gain = ratio(numerator.square(), denominator)
                better = (gain > best_gain) & (numerator > 0)
                best = torch.where(better, ratio(numerator, denominator), best)
                best_zeros = torch.where(better, zeros, best_zeros)
                best_gain = torch.where(better, gain, best_gain)
        return self._refined(unit, best, best_zeros, top), best_zeros

    def _search_symmetric(
        self, unit: torch.Tensor, top: int, carried: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`_search`, with the zero point in the middle and a scale of either sign: that
        of the smaller step that keeps the range for absmax, the better of both for mse."""
        zero = (top + 1) // 2
        zeros = torch.full(unit.shape[:1], float(zero), device=unit.device)
        low, high = unit.amin(dim=1).clamp_max_(0), unit.amax(dim=1).clamp_min_(0)
        upright = torch.maximum(-low / zero, high / max(zero - 1, 1))
        mirrored = torch.maximum(high / zero, -low / max(zero - 1, 1))
        base = torch.where(mirrored < upright, -mirrored, upright)
        if self.scale == "absmax":
            return base, zeros
        best, best_gain = base, torch.zeros_like(base)
        for sign, step in ((1.0, upright), (-1.0, mirrored)):
            begin = step if carried is None else torch.where(carried > TINY, carried, step)
            for multiple in grid(self.bits, warm=carried is not None):
                numerator, denominator = self._products(unit, begin * (multiple * sign), zeros, top)
                gain = ratio(numerator.square(), denominator)
                better = (gain > best_gain) & (numerator * sign > 0)
                best = torch.where(better, ratio(numerator, denominator), best)
                best_gain = torch.where(better, gain, best_gain)
        return self._refined(unit, best, zeros, top), zeros

    def _refined(
        self, unit: torch.Tensor, best: torch.Tensor, zeros: torch.Tensor, top: int
    ) -> torch.Tensor:
        """Least-squares scales of the codes at ``best``, some times over."""
        for _ in range(REFINEMENTS):
            numerator, denominator = self._products(unit, best, zeros, top)
            best = torch.where(numerator * best > 0, ratio(numerator, denominator), best)
        return best

    def _products(
        self, unit: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """<x, q> and <q, q> per group, where q are the code - zero chosen at ``scales``."""
        offsets = self._offsets(unit, scales[:, None], zeros[:, None], top)
        return torch.linalg.vecdot(unit, offsets), torch.linalg.vecdot(offsets, offsets)

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

    def prepare(
        self, pieces: Sequence[slice], target: Callable[[slice], torch.Tensor], fit: Fit
    ) -> TensorUniformQuantizer:
        count, total, squares = 0, 0.0, 0.0
        low, high = math.inf, -math.inf
        for piece in map(target, pieces):
            wide = piece.double()
            count += wide.numel()
            found = wide.sum(), wide.square().sum(), *(each.double() for each in piece.aminmax())
            added, more, least, most = torch.stack(found).tolist()  # a device is waited for once
            total, squares = total + added, squares + more
            low, high = min(low, least), max(high, most)
        mean = total / count
        variance = max(squares - count * mean * mean, 0.0) / max(count - 1, 1)
        reach = 2 * math.sqrt(variance)
        levels = torch.linspace(
            max(low, mean - reach), min(high, mean + reach), 2**self.bits, dtype=torch.float64
        )
        return replace(self, levels=levels.float().to(wide.device))

    def search(self) -> Search | None:
        return None

    def fit(self, rows: torch.Tensor, start: Parameters | None) -> Fitted:
        scales = torch.ones(1, dtype=torch.float32, device=rows.device)
        codes, values = self.encode_at(rows, scales, None)
        return Fitted(codes, Parameters(scales, None), values)

    def encode(self, rows: torch.Tensor, parameters: Parameters) -> Fitted:
        """Raises ValueError: the one scale is 1, there is none to round."""
        raise ValueError("uniform-tensor has no scales to be given")

    def encode_at(
        self, x: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.levels is not None
        levels = self.levels
        spacing = (levels[-1] - levels[0]) / (len(levels) - 1)
        position = (x - levels[0]) / torch.where(spacing == 0, torch.ones_like(spacing), spacing)
        codes = position.round_().clamp_(0, len(levels) - 1).to(torch.uint8)
        return codes, levels.take(codes.long())

    def block_index(self, rows: slice, chosen: torch.Tensor, columns: int) -> torch.Tensor:
        return chosen.new_zeros((len(chosen), rows.stop - rows.start))

    def assemble(self, codes: torch.Tensor, parameters: Parameters) -> Quantized:
        assert self.levels is not None
        return Quantized(self.bits, 0, codes, parameters.scales[:1], None, self.levels)
