"""Codes and scales as blocks of ggml's types, which hold the very same values, and back.

A block of Q4_0, Q4_1, IQ4_NL and Q8_0 has 32 weights, of Q2_0 64, of one row each; d and m are
float16 (ggml-common.h; decoding: ``dequantize_row_*`` in ggml-quants.c).

====== ======================  ==========================================================
type   bytes                   value
====== ======================  ==========================================================
Q2_0   d, 16 of four codes     d (q - 1), the first code lowest
Q4_0   d, 16 of two codes      d (q - 8); the lower halves are the first sixteen codes
Q4_1   d, m, 16 of two codes   d q + m, likewise
IQ4_NL d, 16 of two codes      d level[q], likewise
Q8_0   d, 32 signed codes      d q
====== ======================  ==========================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loftq_cli.exporting.gguf.file import KINDS, Kind
from loftq_cli.numerics.quantizers.blocks import Quantized
from loftq_cli.numerics.quantizers.codebooks import iq4_nl
from loftq_cli.numerics.quantizers.methods import method

Q4_0, Q4_1, Q8_0, IQ4_NL, Q2_0 = (KINDS[number] for number in (2, 3, 8, 20, 42))
BY_SIZE = (Q2_0, Q4_0, IQ4_NL, Q4_1, Q8_0)
"""From the fewest bits a weight to the most."""
_LEAST = 32  # weights of the shortest block
_LEVEL_UNIT = 128  # ggml's levels are integers, ours 128ths of them
_FIXED = {Q2_0: (2, 1), Q4_0: (4, 8), Q8_0: (8, 0)}  # bits of a code and zero point


def obstacle(kind: Kind, name: str, bits: int, block_size: int, columns: int) -> str | None:
    """Why blocks of ``kind`` cannot hold ``bits`` codes by the method ``name`` with a scale for
    ``block_size`` of ``columns`` weights, or None if they can; whether its scales fit float16 is
    seen when they are there."""
    found = method(name)
    affine = found.decoding == "affine"
    if affine == (kind is IQ4_NL) or (not affine and bits != 4):
        return f"its levels are those of {name}"
    if columns % kind.elements:
        return f"rows of {columns} are no blocks of {kind.elements}"
    if affine and block_size and columns % block_size:
        return f"the last of its blocks of {block_size} is cut off"
    if not block_size or block_size % kind.elements:
        return f"{kind.name} has a scale for {kind.elements} weights, not for {block_size}"
    if kind is IQ4_NL:
        return None
    if kind is Q4_1:
        return None if bits <= 4 else f"Q4_1 has 4-bit codes, not {bits}-bit"
    if not found.symmetric:
        return f"{kind.name} has no zero points"
    least = {Q2_0: (2,), Q4_0: (2, 3, 4), Q8_0: (8,)}[kind]
    return None if bits in least else f"{kind.name} does not hold {bits}-bit codes"


@dataclass(frozen=True)
class Rows:
    """Some rows of matrices with ``columns`` weights each: ``codes`` uint8 (rows, columns),
    ``scales`` float32 and ``zeros`` int (rows, blocks); instead of zeros, ``levels`` float32, of
    which the codes are numbers."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    levels: torch.Tensor | None = None

    @staticmethod
    def of(quantized: Quantized, shape: Sequence[int]) -> Rows:
        """All rows of a matrix (out, in). Blocks of a codebook, which run over the flattened
        matrix, are cut to those of 32 weights, of which rows are multiples."""
        rows, codes = shape[0], quantized.codes.view(shape[0], -1)
        if quantized.zeros is None:
            pieces = quantized.scales.float().repeat_interleave(quantized.block_size // _LEAST)
            scales = pieces[: codes.numel() // _LEAST].view(rows, -1)
            return Rows(codes, scales, None, quantized.levels)
        scales, zeros = (part.view(rows, -1) for part in (quantized.scales, quantized.zeros))
        return Rows(codes, scales.float(), zeros.int())

    def taken(self, rows: torch.Tensor) -> Rows:
        """The rows of these numbers."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return Rows(self.codes[rows], self.scales[rows], zeros, self.levels)

    def decode(self) -> torch.Tensor:
        """Their values, float32 (rows, columns): scale times code less zero point, or level."""
        blocks = self.codes.view(*self.scales.shape, -1)
        if self.zeros is None:
            assert self.levels is not None
            values = self.levels[blocks.long()]
        else:
            values = (blocks.int() - self.zeros[..., None]).float()
        return (self.scales[..., None] * values).view(self.codes.shape)


def encode(kind: Kind, rows: Rows) -> torch.Tensor:
    """uint8 (rows, bytes of a row). Scales are rounded to float16: :func:`decode` says whether the
    values are the same."""
    count, columns = rows.codes.shape
    each = columns // rows.scales.shape[1] // kind.elements  # blocks that share a scale
    scales = rows.scales.repeat_interleave(each, dim=1)
    codes = rows.codes.view(count, -1, kind.elements).int()
    if rows.zeros is None:
        parts = [_half(scales / _LEVEL_UNIT), _nibbles(codes)]
        return torch.cat(parts, dim=-1).view(count, -1)
    zeros = rows.zeros.repeat_interleave(each, dim=1)
    if kind is Q4_1:
        parts = [_half(scales), _half(-scales * zeros), _nibbles(codes)]
    elif kind is Q8_0:
        parts = [_half(scales), (codes - zeros[..., None]).to(torch.int8).view(torch.uint8)]
    else:
        bits, zero = _FIXED[kind]
        moved = codes - zeros[..., None] + zero
        if int(moved.max()) >= 1 << bits or int(moved.min()) < 0:  # the other way round
            scales, moved = -scales, 2 * zero - moved
        packed = _nibbles(moved) if bits == 4 else _quarters(moved)
        parts = [_half(scales), packed]
    return torch.cat(parts, dim=-1).view(count, -1)


def decode(kind: Kind, raw: torch.Tensor, columns: int) -> torch.Tensor:
    """float32 (rows, columns) of uint8 (rows, bytes of a row), as ggml computes it."""
    blocks = raw.view(len(raw), -1, kind.nbytes)
    scales = _floats(blocks[..., :2])
    if kind is Q8_0:
        values = blocks[..., 2:].contiguous().view(torch.int8).float() * scales
    elif kind is Q4_1:
        packed = blocks[..., 4:]
        codes = torch.cat([packed & 15, packed >> 4], dim=-1)
        values = codes.float() * scales + _floats(blocks[..., 2:4])
    elif kind is IQ4_NL:
        packed = blocks[..., 2:]
        codes = torch.cat([packed & 15, packed >> 4], dim=-1)
        values = (iq4_nl() * _LEVEL_UNIT)[codes.long()] * scales
    else:
        _, zero = _FIXED[kind]
        packed = blocks[..., 2:]
        if kind is Q4_0:
            codes = torch.cat([packed & 15, packed >> 4], dim=-1)
        else:
            codes = torch.stack([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1)
            codes = codes.flatten(-2)
        values = (codes.int() - zero).float() * scales
    return values.reshape(len(raw), columns)


def _half(values: torch.Tensor) -> torch.Tensor:
    """float16, as bytes (…, 2)."""
    return values.half().contiguous().view(torch.uint8).view(*values.shape, 2)


def _floats(raw: torch.Tensor) -> torch.Tensor:
    """float32 (…, 1) of float16 as bytes (…, 2)."""
    return raw.contiguous().view(torch.float16).float()


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """(…, 32) codes to (…, 16) bytes."""
    low, high = codes[..., :16], codes[..., 16:]
    return (low | (high << 4)).to(torch.uint8)


def _quarters(codes: torch.Tensor) -> torch.Tensor:
    """(…, 64) codes to (…, 16) bytes."""
    four = codes.view(*codes.shape[:-1], 16, 4)
    packed = four[..., 0] | (four[..., 1] << 2) | (four[..., 2] << 4) | (four[..., 3] << 6)
    return packed.to(torch.uint8)
