"""Packed codes to values, all ways of decoding, against one big integer and plain arithmetic."""

from __future__ import annotations

import pytest
import torch

from loftq_cli.checkpoint.packing import packed_length, unpack
from loftq_cli.kernels import native
from loftq_cli.numerics.quantizers import decoding
from loftq_cli.numerics.quantizers.blocks import Quantized, block_count
from loftq_cli.numerics.quantizers.decoding import decode
from loftq_cli.numerics.quantizers.packed import Packed
from tests.support.quantizing import needs_kernels

SHAPES = [(1, 1), (3, 64), (7, 45), (8, 129), (16, 96), (33, 70), (50, 64)]
WAYS = ["one chunk", "many chunks", "at once", pytest.param("kernels", marks=needs_kernels)]
every_width = pytest.mark.parametrize("bits", [2, 3, 4, 8])
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(autouse=True)
def chosen(way, monkeypatch) -> None:
    """Decode in the way that the test names."""
    if way == "kernels":
        return
    monkeypatch.setattr(native, "available", lambda: False)
    if way == "many chunks":
        monkeypatch.setattr(decoding, "_CHUNK", 64)
    if way == "at once":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def random_bytes(count: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (packed_length(count, bits),)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


def codes_of(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    stream = int.from_bytes(bytes(packed.tolist()), "little")
    return torch.tensor([(stream >> (bits * k)) % 2**bits for k in range(count)])


@every_way
@every_width
@pytest.mark.parametrize("block_size", [32, 64, 0])
def test_codebook(way, bits, block_size) -> None:
    for rows, columns in SHAPES:
        count = rows * columns
        weight = random_bytes(count, bits, seed=rows)
        size = block_size or count
        scales, levels = torch.randn(-(-count // size)), torch.randn(2**bits)
        expected = levels[codes_of(weight, bits, count)] * scales[torch.arange(count) // size]
        actual = decode(Packed((rows, columns), bits, block_size, weight, scales, None, levels))
        assert torch.equal(actual, expected.view(rows, columns))


@every_way
@every_width
@pytest.mark.parametrize("block_size", [32, 64])
def test_zero_points(way, bits, block_size) -> None:
    for rows, columns in SHAPES:
        count, groups = rows * columns, -(-columns // block_size)
        weight = random_bytes(count, bits, seed=rows)
        zeros = random_bytes(rows * groups, bits, seed=rows + 1)
        scales = torch.randn(rows * groups)
        k = torch.arange(count)
        block = k // columns * groups + k % columns // block_size
        offset = codes_of(zeros, bits, rows * groups)[block]
        expected = (codes_of(weight, bits, count) - offset).float() * scales[block]
        actual = decode(Packed((rows, columns), bits, block_size, weight, scales, zeros))
        assert torch.equal(actual, expected.view(rows, columns))


@every_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_float32_rounded_once(way, dtype) -> None:
    weight, scales = random_bytes(7 * 45, 3, seed=0), torch.randn(10)
    zeros, levels = random_bytes(7 * 2, 3, seed=1), torch.randn(8)
    for affine in (False, True):
        count = 14 if affine else 10
        given = (zeros if affine else None, None if affine else levels)
        scales = torch.randn(count)
        exact = decode(Packed((7, 45), 3, 32, weight, scales, *given))
        actual = decode(Packed((7, 45), 3, 32, weight, scales, *given), dtype)
        assert actual.dtype == dtype
        assert torch.equal(actual, exact.to(dtype))


@pytest.mark.parametrize("way", ["one chunk"])
@every_width
def test_a_matrix_of_several_chunks(way, bits) -> None:
    rows, columns = 1100, 1000
    assert rows * columns > 2 * decoding._CHUNK
    weight, levels = random_bytes(rows * columns, bits, seed=0), torch.randn(2**bits)
    codes = unpack(weight, bits, rows * columns).view(rows, columns)
    groups = rows * block_count(columns, 64)
    zeros, scales = random_bytes(groups, bits, seed=1), torch.randn(groups)
    affine = Quantized(bits, 64, codes, scales, unpack(zeros, bits, groups))
    packed = Packed((rows, columns), bits, 64, weight, scales, zeros)
    assert torch.equal(decode(packed), affine.decode())
    scales = scales[: block_count(rows * columns, 64)]
    codebook = Quantized(bits, 64, codes, scales, None, levels)
    decoded = decode(Packed((rows, columns), bits, 64, weight, scales, None, levels))
    assert torch.equal(decoded, codebook.decode())


@pytest.mark.parametrize("way", ["one chunk"])
def test_nan_payloads_and_signed_zeros_survive(way) -> None:
    """Pairs of levels are moved as one wider number, which must not be computed with."""
    bits = torch.tensor([0x7FA00001, -0x80000000, 0x7F800000, 1], dtype=torch.int32)
    levels = bits.view(torch.float32)
    weight = torch.tensor([0b11_10_01_00], dtype=torch.uint8)
    decoded = decode(Packed((1, 4), 2, 64, weight, torch.ones(1), None, levels))
    expected = (levels * torch.ones(1)).view(torch.int32)
    assert torch.equal(decoded.view(torch.int32).view(-1), expected)
