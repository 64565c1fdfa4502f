"""Quantizer ``scale * levels[code]``: nf, nf-symmetric and the reference code's uniform-block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from loftq_cli.numerics.quantizers.blocks import (
    TINY,
    Fit,
    Fitted,
    Parameters,
    Quantized,
    divide,
    multiply_reciprocal,
    nonzero,
    ratio,
)
from loftq_cli.numerics.quantizers.codebooks import Table, nearest
from loftq_cli.numerics.quantizers.flattened import Flattened
from loftq_cli.numerics.quantizers.grid import LARGEST_BLOCK, REFINEMENTS, Search, grid


@dataclass(frozen=True)
class CodebookQuantizer(Flattened):
    """``scale * levels[code]`` in blocks over the row-major flattened matrix.

    ``scale``: "spread" is the reference's mean + 2.5 standard deviations. ``native``: on a CPU
    the compiled kernels may search.
    """

    table: Table
    bits: int
    block_size: int
    scale: Literal["mse", "absmax", "spread"]
    native: bool = False

    def prepare(
        self, pieces: Sequence[slice], target: Callable[[slice], torch.Tensor], fit: Fit
    ) -> CodebookQuantizer:
        return self

    def search(self) -> Search | None:
        if not self.native or self.scale != "mse" or self.block_size > LARGEST_BLOCK:
            return None
        return Search(self.bits, self.block_size, self.table)

    def fit(self, rows: torch.Tensor, start: Parameters | None) -> Fitted:
        table = self.table.to(rows.device)
        parts = []
        for blocks, index in self.blocks(rows):
            begin = None if start is None else start.scales[index]
            parts.append(self._fit(blocks, table, begin))
        codes, scales, values = (
            torch.cat([part.reshape(-1) for part in column]) if len(column) > 1 else column[0]
            for column in zip(*parts, strict=True)
        )
        return Fitted(
            codes.view(rows.shape), Parameters(scales.view(-1), None), values.view(rows.shape)
        )

    def encode(self, rows: torch.Tensor, parameters: Parameters) -> Fitted:
        codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
        values = torch.empty_like(rows)
        for (blocks, index), (code_blocks, _), (value_blocks, _) in zip(
            self.blocks(rows), self.blocks(codes), self.blocks(values), strict=True
        ):
            chosen, decoded = self.encode_at(blocks, parameters.scales[index, None], None)
            code_blocks.copy_(chosen)
            value_blocks.copy_(decoded)
        return Fitted(codes, parameters, values)

    def encode_at(
        self, x: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        table = self.table.to(x.device)
        codes = nearest(x / nonzero(scales), table)
        return codes, table.levels.take(codes.long()) * scales

    def _fit(
        self, blocks: torch.Tensor, table: Table, begin: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(codes, scales, values) of float32 ``blocks`` (count, size)."""
        if self.scale == "spread":
            # The reference code's block-wise uniform: mean + 2.5 standard deviations.
            # At powers of two, which change no digit: squares of large values would overflow.
            _, powers = torch.frexp(blocks.abs().amax(dim=1))
            near = torch.ldexp(blocks, -powers[:, None])
            spread = near.std(dim=1) if near.shape[1] > 1 else near.new_zeros(len(near))
            scales = torch.ldexp(near.mean(dim=1) + 2.5 * spread, powers)
            unit = divide(blocks, scales)
        else:
            scales = blocks.abs().amax(dim=1)
            normalize = multiply_reciprocal if table.reciprocal else divide
            unit = normalize(blocks, scales)
            if self.scale == "mse":
                relative = self._search(unit, table, scales, begin)
                scales = scales * relative
                unit = unit.div_(nonzero(relative)[:, None])
        codes = nearest(unit, table)
        values = table.levels.take(codes.long()) * scales[:, None]
        return codes, scales, values

    def _search(
        self, unit: torch.Tensor, table: Table, absmax: torch.Tensor, begin: torch.Tensor | None
    ) -> torch.Tensor:
        """Least-squares scales relative to ``absmax``: the best of a grid, refined."""
        base = torch.ones_like(absmax)
        if begin is not None:
            # Clamped: at a scale far too large every code would be zero for good.
            carried = (begin / nonzero(absmax)).clamp_(-2.0, 2.0)
            base = torch.where(carried.abs() > TINY, carried, base)
        best = base
        best_gain = torch.zeros_like(base)
        mirrored = not table.symmetric
        for multiple in grid(self.bits, warm=begin is not None, mirrored=mirrored):
            candidate = base * multiple
            numerator, denominator = self._products(unit, table, candidate)
            gain = ratio(numerator.square(), denominator)
            better = (gain > best_gain) & (numerator * candidate > 0)
            best = torch.where(better, ratio(numerator, denominator), best)
            best_gain = torch.where(better, gain, best_gain)
        for _ in range(REFINEMENTS):
            numerator, denominator = self._products(unit, table, best)
            best = torch.where(numerator * best > 0, ratio(numerator, denominator), best)
        return best

    def _products(
        self, unit: torch.Tensor, table: Table, scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """<x, q> and <q, q> per block, where q are the levels chosen at ``scales``."""
        levels = table.levels.take(nearest(unit / nonzero(scales)[:, None], table).long())
        return torch.linalg.vecdot(unit, levels), torch.linalg.vecdot(levels, levels)

    def assemble(self, codes: torch.Tensor, parameters: Parameters) -> Quantized:
        levels = self.table.to(codes.device).levels
        return Quantized(self.bits, self.block_size, codes, parameters.scales, None, levels)
