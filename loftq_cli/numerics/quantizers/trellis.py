"""Quantizer with the trellis code (trellis_code.py): codes of 2 bits that are found together.

Of a normal distribution's variance 0.076 is left, where the best four levels that every weight
chooses alone leave 0.117, and no code of 2 bits leaves less than 0.0625. The codes are found by
Viterbi's search (viterbi.py). A block's scale is its root mean square, then the best for the codes
by least squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from loftq_cli.numerics.quantizers.blocks import (
    Fit,
    Fitted,
    Parameters,
    Quantized,
    nonzero,
    ratio,
    scale_blocks,
)
from loftq_cli.numerics.quantizers.flattened import Flattened
from loftq_cli.numerics.quantizers.grid import Search
from loftq_cli.numerics.quantizers.trellis_code import (
    BITS,
    SEQUENCE,
    SHORTEST,
    alone,
    levels,
    numbers,
)
from loftq_cli.numerics.quantizers.viterbi import search

_REACH = 4.0  # root mean squares: the largest level is at 3.3, and few normal weights are beyond
_ROUNDS = 2  # of the first step: codes, then scales


@dataclass(frozen=True)
class TrellisQuantizer(Flattened):
    """``scale * level`` in blocks over the row-major flattened matrix. Rows are handed to it from
    the beginning of a sequence on. ``native``: the compiled kernels may search."""

    block_size: int
    native: bool = False

    def row_step(self, columns: int) -> int:
        return math.lcm(super().row_step(columns), SEQUENCE)

    def prepare(
        self, pieces: Sequence[slice], target: Callable[[slice], torch.Tensor], fit: Fit
    ) -> TrellisQuantizer:
        return self

    def search(self) -> Search | None:
        return None

    def fit(self, rows: torch.Tensor, start: Parameters | None) -> Fitted:
        scales = torch.cat([_first_scales(blocks) for blocks, _ in self.blocks(rows)])
        if start is not None:
            scales = torch.where(start.scales > 0, start.scales, scales)
        for _ in range(_ROUNDS if start is None else 1):
            codes = self._codes(rows, scales)
            units = levels(rows.device)[numbers(codes)]
            pairs = zip(self.blocks(rows), self.blocks(units), strict=True)
            scales = torch.cat(
                [
                    scales[index] * _best_factors(blocks / nonzero(scales[index])[:, None], unit)
                    for (blocks, index), (unit, _) in pairs
                ]
            )
        return self._fitted(codes, units, Parameters(scales, None))

    def encode(self, rows: torch.Tensor, parameters: Parameters) -> Fitted:
        codes = self._codes(rows, parameters.scales)
        units = levels(rows.device)[numbers(codes)]
        return self._fitted(codes, units, parameters)

    def encode_at(
        self, x: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        column, own = x.view(1, -1), scales.expand_as(x).reshape(1, -1)
        codes = self._search_columns(column, own).T
        units = levels(x.device)[numbers(codes)]
        return codes.view(x.shape), units.view(x.shape) * scales

    def assemble(self, codes: torch.Tensor, parameters: Parameters) -> Quantized:
        table = levels(codes.device)
        return Quantized(BITS, self.block_size, codes, parameters.scales, None, table)

    def _codes(self, rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The best codes of ``rows`` (rows, in) at given ``scales`` (blocks,)."""
        each = scale_blocks(torch.ones_like(rows).view(-1), scales, self.block_size)
        found = self._search_columns(rows.T.contiguous(), each.view_as(rows).T.contiguous())
        return found.T.contiguous()

    def _search_columns(self, columns: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Codes uint8 (columns, rows) of ``columns`` float32 (columns, rows) of a matrix."""
        count, rows = columns.shape
        whole = rows - rows % SEQUENCE
        wanted, own = (each[:, :whole].reshape(-1, SEQUENCE) for each in (columns, scales))
        parts = [search(wanted, own, self.native).view(count, whole)]
        rest, scales = columns[:, whole:], scales[:, whole:]
        if rest.shape[1] >= SHORTEST:
            parts.append(search(rest, scales, self.native))
        else:
            choice = levels(columns.device)[alone(columns.device)]
            parts.append((rest[..., None] - scales[..., None] * choice).abs().argmin(dim=2).byte())
        return torch.cat(parts, dim=1)

    def _fitted(self, codes: torch.Tensor, units: torch.Tensor, parameters: Parameters) -> Fitted:
        values = scale_blocks(units.view(-1), parameters.scales, self.block_size)
        return Fitted(codes, parameters, values.view_as(units))


def _first_scales(blocks: torch.Tensor) -> torch.Tensor:
    """Of ``blocks`` (count, size): the root mean square, more where that would cut off the largest
    weight."""
    largest = blocks.abs().amax(dim=1)
    relative = blocks / nonzero(largest)[:, None]
    return largest * relative.square().mean(dim=1).sqrt().clamp_min(1 / _REACH)


def _best_factors(blocks: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """What to multiply ``units`` (count, size) by, per row, to come nearest to ``blocks``; 0 where
    that is not positive."""
    found = ratio(torch.linalg.vecdot(blocks, units), torch.linalg.vecdot(units, units))
    return found.clamp_min(0.0)
