"""Quantizer with levels fitted to each matrix: Lloyd's algorithm, jointly with the scales.

For fixed codes and scales the best level of a code is the mean of its weights, each in units of
its scale and counted with the scale's square; for fixed levels the scales are searched for as
always. Alternating both on a sample of rows, from NormalFloat on, takes the squared error to where
neither gains (S. P. Lloyd, "Least squares quantization in PCM", 1982). Every alternation step
begins with the levels of the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from loftq_cli.numerics.quantizers.blocks import Fit, Parameters
from loftq_cli.numerics.quantizers.codebook import CodebookQuantizer
from loftq_cli.numerics.quantizers.codebooks import make_table

_SAMPLE_ELEMENTS = 1 << 18  # the levels change by less than 1e-3 with four times as many
_SAMPLE_RANGES = 64
_COLD_ROUNDS = 12
_WARM_ROUNDS = 3
_CLOSEST = 1e-3  # levels nearer than this are as good as one; codebooks.make_table needs distance


@dataclass(frozen=True)
class FittedQuantizer(CodebookQuantizer):
    """A codebook quantizer that :meth:`prepare` gives new levels. ``fitted``: it has some."""

    fitted: bool = False

    def prepare(
        self, pieces: Sequence[slice], target: Callable[[slice], torch.Tensor], fit: Fit
    ) -> FittedQuantizer:
        sample = self._sample(pieces[-1].stop, target)
        quantizer: FittedQuantizer = self
        start: Parameters | None = None
        for _ in range(_WARM_ROUNDS if self.fitted else _COLD_ROUNDS):
            fitted = fit(quantizer, sample, start)
            levels = self._best_levels(sample, fitted.codes, fitted.parameters.scales)
            if levels is None:
                break
            start = fitted.parameters
            # Ties are nobody's contract here; deciding them as argmin does takes 200 bisections.
            table = make_table(levels, as_bitsandbytes=True)
            quantizer = replace(quantizer, table=table, fitted=True)
        return quantizer

    def _sample(self, rows: int, target: Callable[[slice], torch.Tensor]) -> torch.Tensor:
        """Evenly spaced row ranges of whole blocks, together about _SAMPLE_ELEMENTS."""
        first = target(slice(0, 1))
        columns = first.shape[1]
        unit = self.row_step(columns)
        wanted = max(_SAMPLE_ELEMENTS // columns // unit, 1) * unit
        if wanted >= rows:
            return target(slice(0, rows))
        ranges = min(_SAMPLE_RANGES, wanted // unit)
        length = wanted // ranges // unit * unit
        spacing = rows // ranges // unit * unit
        starts = range(0, ranges * spacing, spacing)
        return torch.cat([target(slice(start, start + length)) for start in starts])

    def _best_levels(
        self, sample: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
    ) -> torch.Tensor | None:
        """Float32 (2**bits,) ascending, the largest magnitude 1; None if there are none better
        to be had (too few distinct values)."""
        size = self.block_size
        flat = sample.reshape(-1).double()
        weights = scales.double().repeat_interleave(size)[: flat.numel()]
        index = codes.reshape(-1).long()
        count = 2**self.bits
        shape = torch.zeros(count, dtype=torch.float64, device=sample.device)
        sums = (
            shape.index_add(0, index, weights * flat),
            shape.index_add(0, index, weights.square()),
        )
        numerator, denominator = torch.stack(sums).cpu()  # a device is waited for once
        if not bool((denominator > 0).all()):
            return None
        levels = (numerator / denominator).sort().values
        largest = levels.abs().max()
        if not bool(torch.isfinite(largest) & (largest > 0)):
            return None
        if levels[-1] < largest:  # scales have a sign: mirrored levels are the same codebook
            levels = -levels.flip(0)
        levels = (levels / largest).float()
        return levels if bool((levels.diff() >= _CLOSEST).all()) else None
