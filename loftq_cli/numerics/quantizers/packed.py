"""A quantized matrix in its packed form, as every decoder takes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loftq_cli.checkpoint.packing import unpack
from loftq_cli.numerics.quantizers import trellis_code
from loftq_cli.numerics.quantizers.blocks import Quantized


@dataclass(frozen=True)
class Packed:
    """A matrix of ``shape`` (out, in) in codes of ``bits``, 2, 3, 4 or 8.

    ``codes`` uint8, the bit stream of packing.py over the row-major codes; ``scales`` float32
    (blocks,). With ``levels`` float32, (2**bits,) or those of the trellis code, blocks of
    ``block_size`` run over the flattened matrix, 0 being one block for all of it; with ``zeros``
    uint8, packed zero points, one for each scale, they run along each row.
    """

    shape: tuple[int, int]
    bits: int
    block_size: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    levels: torch.Tensor | None = None

    def unpacked(self) -> Quantized:
        """The same with a code an element."""
        zeros = None
        if self.zeros is not None:
            zeros = unpack(self.zeros, self.bits, self.scales.numel())
        codes = unpack(self.codes, self.bits, self.elements).view(self.shape)
        return Quantized(self.bits, self.block_size, codes, self.scales, zeros, self.levels)

    @property
    def is_trellis(self) -> bool:
        """Whether several codes choose a level together (trellis_code.py)."""
        return trellis_code.are_levels(self.levels)

    @property
    def alone(self) -> torch.Tensor | None:
        """Of the trellis code, the numbers of the levels that a code chooses alone."""
        return trellis_code.alone(self.codes.device) if self.is_trellis else None

    @property
    def elements(self) -> int:
        """How many codes there are."""
        return self.shape[0] * self.shape[1]
