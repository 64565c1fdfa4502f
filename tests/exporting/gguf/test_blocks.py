"""Codes in ggml's blocks: against gguf's decoders, golden bytes, and Q itself."""

from __future__ import annotations

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_cli.exporting.gguf import blocks
from loftq_cli.exporting.gguf.blocks import IQ4_NL, Q2_0, Q4_0, Q4_1, Q8_0, Rows
from loftq_cli.exporting.gguf.file import Kind
from loftq_cli.numerics.quantizers.blocks import Quantized
from tests.support.makers import PROPERTY

ZERO = {2: 2, 3: 4, 4: 8, 8: 128}
HELD = [(Q2_0, 2), (Q4_0, 2), (Q4_0, 3), (Q4_0, 4), (Q4_1, 2), (Q4_1, 3), (Q4_1, 4)]
HELD += [(IQ4_NL, 4), (Q8_0, 8)]


LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml-common.h


def drawn(kind: Kind, bits: int, block: int, seed: int) -> Rows:
    """Rows of 128 that ``kind`` can hold, with portable scales: seven bits of a float16 number."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (3, 128), dtype=torch.uint8, generator=generator)
    sevens = torch.randint(64, 128, (3, 128 // block), generator=generator)
    scales = sevens.float() * 2.0**-10
    if kind is not Q4_1:
        scales *= torch.where(torch.rand(scales.shape, generator=generator) < 0.5, -1.0, 1.0)
        zeros = torch.full(scales.shape, ZERO[bits], dtype=torch.int32)
        if kind is IQ4_NL:
            return Rows(codes, scales, None, torch.tensor(LEVELS) / 128)
    else:
        zeros = torch.randint(0, 1 << bits, scales.shape, generator=generator).int()
    return Rows(codes, scales, zeros)


@pytest.mark.parametrize(("kind", "bits"), HELD)
@pytest.mark.parametrize("block", [64, 128])
@PROPERTY
@given(seed=st.integers(0, 99))
def test_blocks_mean_the_very_values(kind: Kind, bits: int, block: int, seed: int) -> None:
    rows = drawn(kind, bits, block, seed)
    raw = blocks.encode(kind, rows)
    assert raw.shape == (3, 128 // kind.elements * kind.nbytes)
    expected = rows.decode()
    assert torch.equal(blocks.decode(kind, raw, 128), expected)
    name = "iq4-nl" if kind is IQ4_NL else "uniform-symmetric"
    assert blocks.obstacle(kind, name, bits, block, 128) is None
    if kind is not Q2_0:  # which gguf 0.19 does not have
        theirs = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType(kind.id))
        assert torch.equal(torch.from_numpy(theirs), expected)


def test_the_bytes_of_a_block() -> None:
    """Written by hand from ggml-common.h: 0.5 is 0x3800, -0.5 0xB800 in float16."""
    codes = torch.arange(64, dtype=torch.uint8) % 4
    two = Rows(codes[None], torch.tensor([[0.5]]), torch.tensor([[2]], dtype=torch.int32))
    # q - 2 has no place among q - 1, so the scale is turned round: 3, 2, 1, 0 of each four.
    assert bytes(blocks.encode(Q2_0, two)[0].tolist()) == b"\x00\xb8" + bytes([0b00011011] * 16)
    codes = torch.arange(32, dtype=torch.uint8) % 16
    four = Rows(codes[None], torch.tensor([[0.5]]), torch.tensor([[8]], dtype=torch.int32))
    nibbles = bytes([n | n << 4 for n in range(16)])
    assert bytes(blocks.encode(Q4_0, four)[0].tolist()) == b"\x00\x38" + nibbles
    odd = Rows(codes[None], torch.tensor([[0.5]]), torch.tensor([[3]], dtype=torch.int32))
    assert bytes(blocks.encode(Q4_1, odd)[0].tolist()) == b"\x00\x38\x00\xbe" + nibbles  # -1.5
    level = Rows(codes[None], torch.tensor([[64.0]]), None, torch.tensor(LEVELS) / 128)
    assert bytes(blocks.encode(IQ4_NL, level)[0].tolist()) == b"\x00\x38" + nibbles
    codes = (torch.arange(32) * 8).to(torch.uint8)
    eight = Rows(codes[None], torch.tensor([[0.5]]), torch.tensor([[128]], dtype=torch.int32))
    signed = bytes([(8 * n - 128) % 256 for n in range(32)])
    assert bytes(blocks.encode(Q8_0, eight)[0].tolist()) == b"\x00\x38" + signed


@pytest.mark.parametrize(
    ("kind", "what", "said"),
    [
        (Q4_0, ("nf", 4, 64, 128), "levels are those of nf"),
        (IQ4_NL, ("uniform", 4, 64, 128), "levels are those of uniform"),
        (IQ4_NL, ("nf", 3, 64, 128), "levels are those of nf"),
        (IQ4_NL, ("iq4-nl", 4, 64, 80), "rows of 80 are no blocks of 32"),
        (Q4_0, ("uniform", 4, 64, 128), "Q4_0 has no zero points"),
        (Q2_0, ("uniform-symmetric", 2, 32, 128), "has a scale for 64 weights, not for 32"),
        (Q2_0, ("uniform-symmetric", 2, 64, 96), "rows of 96 are no blocks of 64"),
        (Q4_1, ("uniform", 8, 64, 128), "Q4_1 has 4-bit codes"),
        (Q4_1, ("uniform", 4, 256, 96), "the last of its blocks of 256 is cut off"),
        (Q8_0, ("uniform-symmetric", 4, 32, 128), "Q8_0 does not hold 4-bit codes"),
    ],
)
def test_what_a_type_cannot_hold_is_said(kind, what, said) -> None:
    assert said in (blocks.obstacle(kind, *what) or "")


def test_a_scale_that_float16_does_not_hold_is_seen() -> None:
    rows = drawn(Q4_0, 4, 64, 0)
    odd = Rows(rows.codes, rows.scales * (1 + 2**-12), rows.zeros)
    assert not torch.equal(blocks.decode(Q4_0, blocks.encode(Q4_0, odd), 128), odd.decode())


@pytest.mark.parametrize(("shape", "size"), [((3, 96), 64), ((2, 64), 128), ((4, 32), 32)])
def test_blocks_of_a_codebook_that_rows_share_are_cut(shape, size) -> None:
    """They run over the flattened matrix: here some begin in a row and end in the next."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator)
    scales = torch.arange(1, -(-codes.numel() // size) + 1).float()
    quantized = Quantized(4, size, codes, scales, None, torch.tensor(LEVELS) / 128)
    raw = blocks.encode(IQ4_NL, Rows.of(quantized, shape))
    assert torch.equal(blocks.decode(IQ4_NL, raw, shape[1]), quantized.decode())
