"""N-bit codes to bytes and back, for any width from 1 to 8 and any count.

The codes form one little-endian bit stream: code ``k`` occupies bits ``k*N`` to ``k*N + N - 1``,
where bit ``i`` of the stream is bit ``i % 8`` (least significant first) of byte ``i // 8``. Eight
codes fill exactly ``N`` bytes; the last bytes of a stream whose length is not a multiple of eight
are padded with zero bits. Worked example, 3 bits, codes 1 2 3 4 5 6 7 0::

    stream (first bit left)  100 010 110 001 101 011 111 000
    bytes  (first bit left)  10001011 00011010 11111000   ->  0xD1 0x58 0x1F

At 32-bit words this is also the order of GPTQ's ``qweight`` and ``qzeros`` (little-endian int32).
"""

from __future__ import annotations

import torch

_CHUNK = 1 << 15  # groups of eight codes per step: bounds the int64 scratch to 2 MiB


def packed_length(count: int, bits: int) -> int:
    """Bytes taken by ``count`` codes of ``bits`` bits."""
    return -(-count * bits // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack a uint8 tensor of codes below ``2**bits``, any shape, into uint8 (packed_length,)."""
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.clone()
    if 8 % bits == 0:
        return _pack_bytes(flat, bits)
    padding = -flat.numel() % 8
    if padding:
        flat = torch.nn.functional.pad(flat, (0, padding))
    groups = flat.view(-1, 8)
    packed = torch.empty((groups.shape[0], bits), dtype=torch.uint8, device=codes.device)
    shifts = torch.arange(8, device=codes.device) * bits
    byte_shifts = torch.arange(bits, device=codes.device) * 8
    for start in range(0, groups.shape[0], _CHUNK):
        words = (groups[start : start + _CHUNK].long() << shifts).sum(dim=1, keepdim=True)
        packed[start : start + _CHUNK] = (words >> byte_shifts) & 0xFF
    return packed.view(-1)[: packed_length(codes.numel(), bits)]


def _pack_bytes(flat: torch.Tensor, bits: int) -> torch.Tensor:
    """As :func:`pack`, if no code crosses a byte."""
    padding = -flat.numel() % (8 // bits)
    if padding:
        flat = torch.nn.functional.pad(flat, (0, padding))
    packed = flat[:: 8 // bits].clone()
    for place in range(1, 8 // bits):
        packed |= flat[place :: 8 // bits] << (place * bits)
    return packed


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Inverse of :func:`pack`: uint8 (packed_length,) to the first ``count`` codes, uint8."""
    if bits == 8:
        return packed[:count].clone()
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        spread: torch.Tensor = (packed[:, None] >> shifts) & (2**bits - 1)
        return spread.view(-1)[:count]
    padding = -packed.numel() % bits
    if padding:
        packed = torch.nn.functional.pad(packed, (0, padding))
    groups = packed.view(-1, bits)
    codes = torch.empty((groups.shape[0], 8), dtype=torch.uint8, device=packed.device)
    shifts = torch.arange(8, device=packed.device) * bits
    byte_shifts = torch.arange(bits, device=packed.device) * 8
    for start in range(0, groups.shape[0], _CHUNK):
        words = (groups[start : start + _CHUNK].long() << byte_shifts).sum(dim=1, keepdim=True)
        codes[start : start + _CHUNK] = (words >> shifts) & (2**bits - 1)
    return codes.view(-1)[:count]


def unpack_at(packed: torch.Tensor, bits: int, places: torch.Tensor) -> torch.Tensor:
    """The codes at ``places`` (count,), integers, of what :func:`pack` made; nothing else is
    unpacked. uint8 (count,)."""
    first = places.long() * bits
    low = first // 8
    high = (low + 1).clamp_max(packed.numel() - 1)  # a code lies in two bytes at most
    words = packed[low].int() | packed[high].int() << 8
    codes: torch.Tensor = (words >> first % 8) & (2**bits - 1)
    return codes.to(torch.uint8)
