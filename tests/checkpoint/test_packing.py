"""Bit packing against bytes worked by hand, a big integer, numpy's bits, and GPTQ's words."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_cli.checkpoint.packing import pack, packed_length, unpack, unpack_at
from tests.support.quantizing import PROPERTY

every_width = pytest.mark.parametrize("bits", range(1, 9))


def random_codes(count: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 2**bits, (count,), generator=generator).to(torch.uint8)


@st.composite
def widths_and_codes(draw) -> tuple[int, list[int]]:
    bits = draw(st.integers(1, 8))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (1, [1, 0, 0, 0, 0, 0, 0, 1, 1], [0x81, 0x01]),
        (2, [3, 2, 1, 0], [0b00_01_10_11]),
        (2, [0, 0, 0, 0, 1], [0x00, 0x01]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0], [0xD1, 0x58, 0x1F]),
        (3, [7, 7, 7], [0xFF, 0x01]),
        (4, [1, 2, 15], [0x21, 0x0F]),
        (5, [31, 0, 31], [0x1F, 0x7C]),
        (6, [63, 1], [0x7F, 0x00]),
        (7, [1, 1], [0x81, 0x00]),
        (8, [0, 255, 7], [0x00, 0xFF, 0x07]),
    ],
)
def test_golden_bytes(bits, codes, packed):
    actual = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert actual.dtype == torch.uint8
    assert actual.tolist() == packed
    assert unpack(actual, bits, len(codes)).tolist() == codes


@PROPERTY
@given(widths_and_codes())
def test_packing_is_one_little_endian_integer_and_round_trips(case):
    bits, codes = case
    stream = sum(code << (bits * k) for k, code in enumerate(codes))
    expected = stream.to_bytes((len(codes) * bits + 7) // 8, "little")
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert bytes(packed.tolist()) == expected
    assert packed_length(len(codes), bits) == len(expected)
    unpacked = unpack(packed, bits, len(codes))
    assert unpacked.dtype == torch.uint8
    assert unpacked.tolist() == codes


@PROPERTY
@given(widths_and_codes(), st.randoms(use_true_random=False))
def test_single_codes_are_found_wherever_they_lie(case, random):
    bits, codes = case
    places = random.choices(range(len(codes)), k=9) if codes else []
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    found = unpack_at(packed, bits, torch.tensor(places, dtype=torch.int64))
    assert found.dtype == torch.uint8
    assert found.tolist() == [codes[place] for place in places]


@every_width
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 31, 32, 33])
def test_every_short_length_round_trips(bits, count):
    codes = random_codes(count, bits)
    packed = pack(codes, bits)
    assert packed.shape == (packed_length(count, bits),)
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_millions_of_codes_round_trip(bits):
    codes = random_codes(2**22 + 5, bits)
    packed = pack(codes, bits)
    spread = numpy.unpackbits(codes.numpy()[:, None], axis=1, count=bits, bitorder="little")
    assert numpy.array_equal(packed.numpy(), numpy.packbits(spread, bitorder="little"))
    assert torch.equal(unpack(packed, bits, codes.numel()), codes)


@every_width
def test_a_matrix_packs_as_its_rows_in_order(bits):
    codes = random_codes(5 * 9, bits)
    assert torch.equal(pack(codes.view(5, 9), bits), pack(codes, bits))


def test_eight_bit_packing_does_not_alias_its_input():
    codes = torch.tensor([1, 2, 3], dtype=torch.uint8)
    packed = pack(codes, 8)
    codes.zero_()
    assert packed.tolist() == [1, 2, 3]


def gptq_words(codes: list[int], bits: int) -> list[int]:
    """32 codes as GPTQ's int32 words, in the steps in which GPTQ-for-LLaMa's packer takes them."""
    if bits != 3:
        per_word = 32 // bits
        words = [
            sum(code << (bits * j) for j, code in enumerate(codes[i : i + per_word]))
            for i in range(0, 32, per_word)
        ]
    else:  # 10 codes, 2 bits of the next; its last bit, 10 codes, 1 bit; 2 bits, 10 codes
        first = sum(codes[j] << (3 * j) for j in range(10)) | codes[10] << 30
        second = codes[10] >> 2 | sum(codes[11 + j] << (3 * j + 1) for j in range(10))
        second |= codes[21] << 31
        third = codes[21] >> 1 | sum(codes[22 + j] << (3 * j + 2) for j in range(10))
        words = [word & 0xFFFFFFFF for word in (first, second, third)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@PROPERTY
@given(data=st.data())
def test_32_codes_are_gptqs_words(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=32, max_size=32))
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.view(torch.int32).tolist() == gptq_words(codes, bits)
