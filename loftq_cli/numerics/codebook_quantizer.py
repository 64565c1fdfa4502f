"""Quantizer ``scale * levels[code]``: nf, nf-symmetric and the reference code's uniform-block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from loftq_cli.numerics import native
from loftq_cli.numerics.blocks import (
    Fitted,
    Parameters,
    Quantized,
    block_count,
    divide,
    multiply_reciprocal,
    nonzero,
    ratio,
)
from loftq_cli.numerics.codebooks import Table, nearest

REFINEMENTS = 2
"""Least-squares steps after the grid, or from the previous alternation step's scales."""

GRID = (1.0, 0.9, 0.8, 0.7, 0.6)
"""Fractions of the largest magnitude that the search for a scale begins with."""


@dataclass(frozen=True)
class CodebookQuantizer:
    """``scale * levels[code]`` in blocks over the row-major flattened matrix.

    ``scale``: "spread" is the reference's mean + 2.5 standard deviations. ``native``: search on the
    CPU with the compiled kernels.
    """

    table: Table
    bits: int
    block_size: int
    scale: Literal["mse", "absmax", "spread"]
    native: bool = False

    def row_step(self, columns: int) -> int:
        return 1 if self.block_size == 0 else self.block_size // math.gcd(columns, self.block_size)

    def blocks_before(self, row: int, columns: int) -> int:
        return block_count(row * columns, self.block_size) if row else 0

    def prepare(self, pieces: Callable[[], Iterable[torch.Tensor]]) -> CodebookQuantizer:
        return self

    def fit(self, rows: torch.Tensor, start: Parameters | None) -> Fitted:
        fits = self.block_size <= native.LARGEST_BLOCK
        if self.native and fits and self.scale == "mse" and not rows.is_cuda:
            return self._fit_native(rows, start)
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
        self, blocks: torch.Tensor, table: Table, begin: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(codes, scales, values) of float32 ``blocks`` (count, size)."""
        if self.scale == "spread":
            # The reference code's block-wise uniform: mean + 2.5 standard deviations.
            spread = blocks.std(dim=1) if blocks.shape[1] > 1 else blocks.new_zeros(len(blocks))
            scales = blocks.mean(dim=1) + 2.5 * spread
            unit = divide(blocks, scales)
        else:
            scales = blocks.abs().amax(dim=1)
            normalize = multiply_reciprocal if table.reciprocal else divide
            unit = normalize(blocks, scales)
            if self.scale == "mse":
                if begin is None:
                    relative = self._search(unit, table)
                else:  # clamped: at a scale far too large every code would be zero for good
                    relative = (begin / nonzero(scales)).clamp_max_(2.0)
                for _ in range(REFINEMENTS):
                    relative = self._refine(unit, table, relative)
                scales = scales * relative
                unit = unit.div_(nonzero(relative)[:, None])
        codes = nearest(unit, table)
        values = table.levels.take(codes.long()) * scales[:, None]
        return codes, scales, values

    def _fit_native(self, rows: torch.Tensor, start: Parameters | None) -> Fitted:
        table = self.table
        codes, scales, values = native.codebook(
            rows,
            self.block_size,
            table.levels,
            table.boundaries,
            (table.lowest, table.cells_per_unit, table.cell_code.int(), table.cell_boundary),
            torch.tensor(GRID),
            REFINEMENTS,
            None if start is None else start.scales,
        )
        return Fitted(codes, Parameters(scales, None), values)

    def _search(self, unit: torch.Tensor, table: Table) -> torch.Tensor:
        """Of a grid of scales, the least-squares scale of the codes that fit best."""
        best = unit.new_ones(len(unit))
        best_gain = unit.new_zeros(len(unit))
        for fraction in GRID:
            scales = torch.full_like(best, fraction)
            numerator, denominator = self._products(unit, table, scales)
            gain = ratio(numerator.square(), denominator)
            better = (gain > best_gain) & (numerator > 0)
            best = torch.where(better, ratio(numerator, denominator), best)
            best_gain = torch.where(better, gain, best_gain)
        return best

    def _refine(self, unit: torch.Tensor, table: Table, scales: torch.Tensor) -> torch.Tensor:
        numerator, denominator = self._products(unit, table, scales)
        return torch.where(numerator > 0, ratio(numerator, denominator), scales)

    def _products(
        self, unit: torch.Tensor, table: Table, scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """<x, q> and <q, q> per block, where q are the levels chosen at ``scales``."""
        levels = table.levels.take(nearest(unit / nonzero(scales)[:, None], table).long())
        return torch.linalg.vecdot(unit, levels), torch.linalg.vecdot(levels, levels)

    def assemble(self, codes: torch.Tensor, parameters: Parameters) -> Quantized:
        levels = self.table.levels.to(codes.device)
        return Quantized(self.bits, self.block_size, codes, parameters.scales, None, levels)
