"""Quantized matrices as codes and per-block parameters, and how they decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from loftq_cli.numerics.quantizers import trellis_code

TINY = torch.finfo(torch.float32).tiny
"""The smallest normal float32: its reciprocal is finite."""


@dataclass(frozen=True)
class Parameters:
    """Per-block parameters as stored: ``scales`` float32 (blocks,), ``zeros`` uint8
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


Fit = Callable[[Any, torch.Tensor, Parameters | None], Fitted]
"""Quantizes float32 rows with a given quantizer, beginning beside given parameters."""


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix, independent of any file layout.

    ``codes`` uint8 (out, in); ``scales`` float32: (blocks,) over the flattened matrix
    with a codebook, (out * groups,) row by row with zero points; ``zeros`` uint8, same length, or
    None; ``levels`` float32 or None: (2**bits,), or those of the trellis code (trellis_code.py).
    ``block_size`` 0 means one block for everything.
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

    @property
    def is_trellis(self) -> bool:
        """Whether several codes choose a level together."""
        return trellis_code.are_levels(self.levels)

    def to(self, device: torch.device) -> Quantized:
        """The same on ``device``."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        levels = None if self.levels is None else self.levels.to(device)
        codes, scales = self.codes.to(device), self.scales.to(device)
        return Quantized(self.bits, self.block_size, codes, scales, zeros, levels)

    def part(self, rows: slice, blocks: slice) -> Quantized:
        """These ``rows``, whose elements are those ``blocks``; of the trellis code whole
        sequences."""
        if self.block_size == 0 and self.levels is not None:
            blocks = slice(None)
        zeros = None if self.zeros is None else self.zeros[blocks]
        return replace(self, codes=self.codes[rows], scales=self.scales[blocks], zeros=zeros)

    def decode(self) -> torch.Tensor:
        """The matrix Q, float32 (out, in)."""
        if self.levels is None:
            return self._decode_affine()
        chosen = trellis_code.numbers(self.codes) if self.is_trellis else self.codes.int()
        flat = self.levels.index_select(0, chosen.reshape(-1))
        return scale_blocks(flat, self.scales, self.block_size).view(self.shape)

    def unscaled(self) -> torch.Tensor:
        """What scales are multiplied with, float32 (out, in): levels, or codes less zero points."""
        return replace(self, scales=torch.ones_like(self.scales)).decode()

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


def nonzero(scales: torch.Tensor) -> torch.Tensor:
    """``scales`` with 1 for 0: the divisor of an all-zero block."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def divide(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """blocks / scale per row, zero blocks as they are."""
    return blocks / nonzero(scales)[:, None]


def multiply_reciprocal(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """blocks times (1 / scale) per row, which rounds as bitsandbytes does."""
    divisor = nonzero(scales)
    tiny = (divisor < TINY)[:, None]  # the reciprocal of a subnormal may overflow
    divisor = divisor[:, None]
    return torch.where(tiny, blocks / divisor, blocks * divisor.reciprocal())


def ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """numerator / denominator, finite if the denominator is zero."""
    return numerator / denominator.clamp_min(TINY)
