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


@dataclass(frozen=True)
class TrellisQuantizer(Flattened):
    """``scale * level`` in blocks over the row-major flattened matrix. Rows are handed
    to it from the beginning of a sequence on."""

    block_size: int

    def row_step(self, columns: int) -> int:
        return math.lcm(super().row_step(columns), SEQUENCE)

    def prepare(
        self, pieces: Sequence[slice], target: Callable[[slice], torch.Tensor], fit: Fit
    ) -> TrellisQuantizer:
        return self

    def search(self) -> Search | None:
        return None

    def fit(self, rows: torch.Tensor, start: Parameters | None) -> Fitted:
        begun = torch.cat([_root_mean_square(blocks) for blocks, _ in self.blocks(rows)])
        codes = self._codes(rows, begun)
        units = levels(rows.device)[numbers(codes)]
        scales = [
            begun[index] * _best_factors(blocks / nonzero(begun[index])[:, None], unit)
            for (blocks, index), (unit, _) in zip(
                self.blocks(rows), self.blocks(units), strict=True
            )
        ]
        return self._fitted(codes, units, Parameters(torch.cat(scales), None))

    def encode(self, rows: torch.Tensor, parameters: Parameters) -> Fitted:
        codes = self._codes(rows, parameters.scales)
        units = levels(rows.device)[numbers(codes)]
        return self._fitted(codes, units, parameters)

    def encode_at(
        self, x: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        column, own = x.view(1, -1), scales.expand_as(x).reshape(1, -1)
        codes = _search_columns(column, own).T
        units = levels(x.device)[numbers(codes)]
        return codes.view(x.shape), units.view(x.shape) * scales

    def assemble(self, codes: torch.Tensor, parameters: Parameters) -> Quantized:
        table = levels(codes.device)
        return Quantized(BITS, self.block_size, codes, parameters.scales, None, table)

    def _codes(self, rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The best codes of ``rows`` (rows, in) at given ``scales`` (blocks,)."""
        each = scale_blocks(torch.ones_like(rows).view(-1), scales, self.block_size)
        found = _search_columns(rows.T.contiguous(), each.view_as(rows).T.contiguous())
        return found.T.contiguous()

    def _fitted(self, codes: torch.Tensor, units: torch.Tensor, parameters: Parameters) -> Fitted:
        values = scale_blocks(units.view(-1), parameters.scales, self.block_size)
        return Fitted(codes, parameters, values.view_as(units))


def _search_columns(columns: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes uint8 (columns, rows) of ``columns`` float32 (columns, rows) of a matrix."""
    count, rows = columns.shape
    whole = rows - rows % SEQUENCE
    wanted, own = (each[:, :whole].reshape(-1, SEQUENCE) for each in (columns, scales))
    parts = [search(wanted, own).view(count, whole)]
    rest, scales = columns[:, whole:], scales[:, whole:]
    if rest.shape[1] >= SHORTEST:
        parts.append(search(rest, scales))
    else:
        choice = levels(columns.device)[alone(columns.device)]
        parts.append((rest[..., None] - scales[..., None] * choice).abs().argmin(dim=2).byte())
    return torch.cat(parts, dim=1)


def _root_mean_square(blocks: torch.Tensor) -> torch.Tensor:
    largest = blocks.abs().amax(dim=1)
    relative = blocks / nonzero(largest)[:, None]
    return largest * relative.square().mean(dim=1).sqrt()


def _best_factors(blocks: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """What to multiply ``units`` (count, size) by, per row, to come nearest to ``blocks``; 1 where
    that is not positive."""
    found = ratio(torch.linalg.vecdot(blocks, units), torch.linalg.vecdot(units, units))
    return torch.where(found > 0, found, 1.0)
