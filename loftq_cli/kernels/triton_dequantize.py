"""Decodes layout ``loftq`` in one Triton kernel: packed bytes in, the weight out.

Each element finds its code in the bit stream, its block and, with zero points, the block's zero
point, or of the trellis code the codes above, by itself: nothing is stored between the packed codes
and the result. The arithmetic is that
of docs/output-format.md, one product in float32 rounded once, so the bits are those of
:func:`loftq_cli.numerics.quantizers.decoding.decode`. Importing this module imports triton.
"""

from __future__ import annotations

from typing import Protocol

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

_ELEMENTS = 1024  # per program
_SEQUENCE, _SHORTEST, _CODES = 256, 24, 5  # of the trellis code, numerics/quantizers/trellis_code


class _Packed(Protocol):
    """What is read of numerics.quantizers.packed.Packed."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def bits(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def codes(self) -> torch.Tensor: ...
    @property
    def scales(self) -> torch.Tensor: ...
    @property
    def zeros(self) -> torch.Tensor | None: ...
    @property
    def levels(self) -> torch.Tensor | None: ...
    @property
    def alone(self) -> torch.Tensor | None: ...


def decode(packed: _Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Q (out, in) in ``dtype`` of a matrix on a CUDA device."""
    out = torch.empty(packed.shape, dtype=dtype, device=packed.codes.device)
    count = out.numel()
    affine, alone = packed.levels is None, packed.alone
    width = packed.shape[1] if affine else count  # that blocks run along
    # triton launches on the current device
    with torch.cuda.device_of(packed.codes):  # type: ignore[no-untyped-call]
        _kernel[(triton.cdiv(count, _ELEMENTS),)](
            packed.codes,
            packed.scales,
            packed.zeros if affine else packed.levels,
            packed.codes if alone is None else alone,
            out,
            count,
            *packed.shape,
            width,
            triton.cdiv(width, packed.block_size) if packed.block_size else 1,
            packed.block_size or count,
            BITS=packed.bits,
            AFFINE=affine,
            TRELLIS=alone is not None,
            SEQUENCE=_SEQUENCE,
            SHORTEST=_SHORTEST,
            CODES=_CODES,
            ELEMENTS=_ELEMENTS,
        )
    return out


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _code(packed, index, mask, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Code number ``index`` of a bit stream."""
    bit = index * BITS
    shift = (bit % 8).to(tl.int32)
    word = tl.load(packed + bit // 8, mask=mask, other=0).to(tl.int32)
    if 8 % BITS != 0:  # the code may end in the next byte
        ends_later = mask & (shift + BITS > 8)
        word |= tl.load(packed + bit // 8 + 1, mask=ends_later, other=0).to(tl.int32) << 8
    return (word >> shift) & ((1 << BITS) - 1)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _kernel(  # type: ignore[no-untyped-def]
    packed,
    scales,
    table,  # the packed zero points, or the levels
    alone,  # of the trellis code: the numbers of levels that a code chooses alone
    out,
    count,
    rows,
    length,  # of a row
    columns,
    groups,  # per row of ``columns``
    block_size,
    BITS: tl.constexpr,
    AFFINE: tl.constexpr,
    TRELLIS: tl.constexpr,
    SEQUENCE: tl.constexpr,
    SHORTEST: tl.constexpr,
    CODES: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = index < count
    code = _code(packed, index, mask, BITS)
    block = index // columns * groups + index % columns // block_size
    scale = tl.load(scales + block, mask=mask, other=0.0)
    if AFFINE:
        value = (code - _code(table, block, mask, BITS)).to(tl.float32)
    else:
        number = code
        if TRELLIS:
            row = index // length
            first = row // SEQUENCE * SEQUENCE
            ring = tl.minimum(rows - first, SEQUENCE)
            for above in tl.static_range(1, CODES):
                place = first + (row - first + ring * CODES - above) % ring
                one = _code(packed, place * length + index % length, mask, BITS)
                number |= one << BITS * above
            number = tl.where(ring < SHORTEST, tl.load(alone + code, mask=mask, other=0), number)
        value = tl.load(table + number, mask=mask, other=0.0)
    tl.store(out + index, (value * scale).to(out.dtype.element_ty), mask=mask)
