"""Packed codes to the matrix they mean, as layout ``loftq`` stores both.

On the CPU the compiled kernels do it, if there are any (native_decoding.py). Without them a
whole byte is looked up at once: a table holds the levels of the four 2-bit or two
4-bit codes in it, side by side, and one gather moves them as a single element of 16 or 8 bytes. At
3 bits three bytes are two 12-bit numbers of four codes each. That is a table of at most 64 KiB, and
no tensor of indices as long as the matrix. The work goes in chunks that stay in cache.

Elsewhere, of the trellis code, and if torch.compile fuses the steps anyway, codes are unpacked and
decoded one by one. All give the same bits: a level, or code - zero, times the scale, rounded once.
"""

from __future__ import annotations

import torch

from loftq_cli.numerics.quantizers import native_decoding
from loftq_cli.numerics.quantizers.blocks import block_count
from loftq_cli.numerics.quantizers.packed import Packed

_CHUNK = 1 << 19  # codes: 2 MiB of float32
_PER_ENTRY = {2: 4, 3: 4, 4: 2}
_CARRIERS = {2: torch.float64, 4: torch.complex128}  # only moved, never computed with


def decode(packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Q (out, in), computed in float32 and rounded to ``dtype``."""
    plain = packed.codes.device.type == "cpu" and not torch.compiler.is_compiling()
    out = native_decoding.decode(packed, dtype) if plain else None
    if out is not None:
        return out
    if plain and not packed.is_trellis:
        return _decode_chunks(packed, dtype)
    return packed.unpacked().decode().to(dtype)


def _decode_chunks(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """:func:`decode` in tensor operations, on the CPU."""
    shape, bits, block_size, scales = packed.shape, packed.bits, packed.block_size, packed.scales
    count = packed.elements
    out = torch.empty(_whole(count), dtype=dtype)
    numbers = _Lookup(torch.arange(2**bits, dtype=torch.float32), bits)
    lookup = numbers if packed.levels is None else _Lookup(packed.levels, bits)
    offsets = None
    if packed.zeros is not None:
        offsets = torch.empty(_whole(scales.numel()))
        numbers.fill(offsets, packed.zeros)
    # What a chunk consists of: blocks, or rows if the last block of each is short.
    ragged = offsets is not None and shape[1] % block_size != 0
    unit = shape[1] if ragged else block_size or 1
    step = 8 * unit * max(1, _CHUNK // (8 * unit))  # codes that end with a byte
    scratch = None if dtype == torch.float32 else torch.empty(min(step, out.numel()))
    for start in range(0, count, step):
        stop = min(start + step, count)
        padded = slice(start, _whole(stop))
        chunk = out[padded] if scratch is None else scratch[: padded.stop - start]
        if scratch is None and torch.get_num_threads() > 1:
            chunk.zero_()  # fresh pages, by all threads: the gather runs on one
        lookup.fill(chunk, packed.codes[start * bits // 8 :])
        values = chunk[: stop - start]
        if ragged:
            rows = slice(start // unit, stop // unit)
            _scale_rows(values.view(-1, unit), block_size, rows, scales, offsets)
        else:
            _scale_flat(values, block_size, start, scales, offsets)
        if scratch is not None:
            out[start:stop] = values
    return out[:count].view(shape)


class _Lookup:
    """The value of every code of a packed stream, several codes a gather."""

    def __init__(self, values: torch.Tensor, bits: int) -> None:
        """``values`` float32 (2**bits,), by code."""
        self._bits = bits
        if bits == 8:
            self._table = values
            return
        together = _PER_ENTRY[bits]
        entries = torch.arange(2 ** (bits * together), dtype=torch.int32)
        codes = (entries[:, None] >> torch.arange(0, bits * together, bits)) & (2**bits - 1)
        table = values.index_select(0, codes.view(-1))
        self._table = table.view(_CARRIERS[together])

    def fill(self, out: torch.Tensor, packed: torch.Tensor) -> None:
        """Write the values of the first codes in ``packed`` to ``out``, float32, a multiple of
        eight long. Codes beyond the end of ``packed`` are 0."""
        needed = out.numel() * self._bits // 8
        packed = packed[:needed]
        if packed.numel() < needed:
            packed = torch.nn.functional.pad(packed, (0, needed - packed.numel()))
        index = self._triples(packed) if self._bits == 3 else packed.int()
        target = out.view(self._table.dtype)
        torch.index_select(self._table, 0, index, out=target)

    @staticmethod
    def _triples(packed: torch.Tensor) -> torch.Tensor:
        """uint8 (3n,) to int32 (2n,): every three bytes as two numbers of 12 bits."""
        first, second, third = packed.view(-1, 3).int().unbind(1)
        word = torch.add(first, second, alpha=1 << 8).add_(third, alpha=1 << 16)
        return torch.stack([word & 0xFFF, word >> 12], dim=1).view(-1)


def _scale_flat(
    values: torch.Tensor,
    size: int,
    start: int,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
) -> None:
    """Scale, in place, the elements from ``start`` on of a flattened matrix; the last block may be
    short."""
    if size == 0:
        values.mul_(scales.float())
        return
    first, whole = start // size, values.numel() // size
    parts = [(values[: whole * size].view(whole, size), slice(first, first + whole))]
    if whole * size < values.numel():
        parts.append((values[whole * size :].view(1, -1), slice(first + whole, first + whole + 1)))
    for blocks, number in parts:
        if offsets is not None:
            blocks.sub_(offsets[number, None])
        blocks.mul_(scales[number, None].float())


def _scale_rows(
    values: torch.Tensor,
    size: int,
    rows: slice,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
) -> None:
    """Scale, in place, the given rows of a matrix whose rows end with a short block."""
    assert offsets is not None
    count, columns = values.shape
    groups, whole = block_count(columns, size), columns // size
    of_row = slice(rows.start * groups, rows.stop * groups)
    offsets = offsets[of_row].view(count, groups, 1)
    factors = scales[of_row].float().view(count, groups, 1)
    body = values[:, : whole * size].view(count, whole, size)
    body.sub_(offsets[:, :whole]).mul_(factors[:, :whole])
    values[:, whole * size :].sub_(offsets[:, whole]).mul_(factors[:, whole])


def _whole(count: int) -> int:
    """``count`` rounded up to a multiple of eight, where every width ends with a byte."""
    return -(-count // 8) * 8
