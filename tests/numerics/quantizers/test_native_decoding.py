"""Decoding in the compiled kernels: bit for bit what the tensor operations give, at every width,
shape, dtype and instruction set, and not at all where memory cannot be read."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from loftq_cli.checkpoint.packing import packed_length
from loftq_cli.kernels import native
from loftq_cli.numerics.quantizers import decoding, native_decoding, trellis_code
from loftq_cli.numerics.quantizers.blocks import block_count
from loftq_cli.numerics.quantizers.decoding import decode
from loftq_cli.numerics.quantizers.packed import Packed
from tests.support.quantizing import needs_kernels

pytestmark = needs_kernels
SHAPES = [(1, 1), (3, 64), (7, 45), (8, 129), (16, 96), (33, 70), (5, 1000)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_width = pytest.mark.parametrize("bits", [2, 3, 4, 8])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random_bytes(count: int, bits: int, generator: torch.Generator) -> torch.Tensor:
    size = (packed_length(count, bits),)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


def make(shape, bits, block_size, *, affine, seed=0):
    """The fields of Packed: scales of either sign, zero, subnormal, and of every magnitude."""
    generator = torch.Generator().manual_seed(seed)
    count = shape[0] * shape[1]
    blocks = shape[0] * block_count(shape[1], block_size)
    if not affine:
        blocks = block_count(count, block_size)
    exponents = torch.randint(-44, 5, (blocks,), generator=generator)
    scales = torch.randn(blocks, generator=generator) * torch.tensor(10.0).pow(exponents)
    scales[::3] = torch.randn(len(scales[::3]), generator=generator)
    scales[5::7] = 0.0
    weight = random_bytes(count, bits, generator)
    if affine:
        return (shape, bits, block_size, weight, scales, random_bytes(blocks, bits, generator))
    levels = torch.randn(2**bits, generator=generator)
    return (shape, bits, block_size, weight, scales, None, levels)


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    kind = torch.int32 if actual.dtype == torch.float32 else torch.int16
    return torch.equal(actual.view(kind), expected.view(kind))


def expected(arguments, dtype) -> torch.Tensor:
    return decoding._decode_chunks(Packed(*arguments), dtype)


def check(arguments, dtype, monkeypatch) -> None:
    """That the kernels decode, and to the same bits."""
    exact = expected(arguments, dtype)
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "_decode_chunks", None)
        assert same_bits(decode(Packed(*arguments), dtype), exact), arguments[:3]


@every_width
@every_dtype
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 0])
@pytest.mark.parametrize("affine", [False, True], ids=["codebook", "zero-points"])
def test_same_bits_as_the_tensor_operations(bits, dtype, block_size, affine, monkeypatch):
    if affine and block_size == 0:
        return
    for shape in SHAPES:
        check(make(shape, bits, block_size, affine=affine, seed=shape[1]), dtype, monkeypatch)


INSTRUCTIONS = [
    pytest.param((), id="portable"),
    pytest.param(("-mavx2",), id="avx2"),
]


@pytest.mark.parametrize("tuning", INSTRUCTIONS)
def test_same_bits_on_lesser_machines(tuning, monkeypatch, tmp_path):
    capable = torch.backends.cpu.get_cpu_capability()
    if tuning and (platform.machine() != "x86_64" or capable not in ("AVX2", "AVX512")):
        pytest.skip("no AVX2 here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_TUNING", (tuning,))
    kernels = native.load.__wrapped__()
    assert kernels.library is not None
    monkeypatch.setattr(native, "load", lambda: kernels)
    for bits in (2, 3, 4, 8):
        for dtype in DTYPES:
            for shape in SHAPES:
                for affine in (False, True):
                    check(make(shape, bits, 64, affine=affine), dtype, monkeypatch)


@every_width
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(bits, threads, monkeypatch):
    monkeypatch.setattr(native_decoding, "_ONE_THREAD", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in ((1, 1), (200, 333), (64, 4096)):
            for size in (64, 0):
                check(make(shape, bits, size, affine=False), torch.float32, monkeypatch)
            check(make(shape, bits, 64, affine=True), torch.bfloat16, monkeypatch)
    finally:
        torch.set_num_threads(before)


@every_dtype
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_of_every_kind_of_number(dtype, bits, monkeypatch):
    """Numbers of all magnitudes, halfway between two of ``dtype`` and beside."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.arange(256, dtype=torch.uint8)
    weight = codes if bits == 8 else torch.tensor([2 * k | (2 * k + 1) << 4 for k in range(8)])
    shape = (1, 2**bits)
    for kept in range(32):
        patterns = torch.randint(0, 2**31 - 2**23, (2**bits,), generator=generator)
        patterns = patterns >> kept << kept | 1 << kept >> 1  # the last bit kept moves a tie
        patterns = patterns.clamp(max=0x7F7FFFFF) | torch.arange(2**bits) % 2 << 31
        levels = patterns.to(torch.int32).view(torch.float32)
        arguments = (shape, bits, 0, weight.to(torch.uint8), torch.ones(1), None, levels)
        check(arguments, dtype, monkeypatch)


@every_dtype
def test_infinity_and_nan_stay(dtype):
    inf, nan = float("inf"), torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    levels = torch.tensor([-inf, inf, float(nan), 0.0])
    levels[2] = nan
    weight = torch.tensor([0b11_10_01_00], dtype=torch.uint8)
    decoded = decode(Packed((1, 4), 2, 64, weight, torch.ones(1), None, levels), dtype).view(-1)
    assert decoded[:2].tolist() == [-inf, inf]
    assert bool(decoded[2].isnan())
    assert decoded[3] == 0


def test_scales_of_another_dtype(monkeypatch):
    *head, scales, _, levels = make((7, 45), 3, 32, affine=False)
    check((*head, scales.bfloat16(), None, levels), torch.float32, monkeypatch)


def test_another_default_device_does_not_matter():
    arguments = make((7, 45), 4, 64, affine=False)
    with torch.device("meta"):
        decoded = decode(Packed(*arguments))
    assert same_bits(decoded, expected(arguments, torch.float32))


def refused(arguments, dtype=torch.float32) -> bool:
    return native_decoding.decode(Packed(*arguments), dtype) is None


def test_incomplete_tensors_are_not_read():
    whole = make((8, 64), 4, 64, affine=False)
    assert not refused(whole)
    for place in (3, 4, 6):
        short = list(whole)
        short[place] = whole[place][:-1]
        assert refused(short), place
    spread = list(whole)
    spread[3] = whole[3].repeat_interleave(2)[::2]
    assert refused(spread)
    *head, zeros = make((8, 64), 4, 64, affine=True)
    assert not refused((*head, zeros))
    assert refused((*head, zeros[:-1]))
    assert refused((*head, None))
    assert refused(make((8, 64), 4, 64, affine=False), torch.float64)


def test_tensors_without_memory_and_recordings_are_left_to_tensor_operations():
    arguments = make((8, 64), 4, 64, affine=False)
    with FakeTensorMode() as mode:
        fake: Any = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in arguments]
        assert decode(Packed(*fake)).shape == (8, 64)
    assert refused(fake)
    wanted = list(arguments)
    wanted[4] = arguments[4].clone().requires_grad_()
    assert refused(wanted)
    seen = []

    def recorded(x):
        seen.append(refused(arguments))
        return x + 1

    with pytest.warns(DeprecationWarning, match="jit"):
        torch.jit.trace(recorded, torch.zeros(1), check_trace=False)
    assert seen[0]


class Recording(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_modes_are_those_of_the_thread():
    arguments = make((8, 64), 4, 64, affine=False)
    mine, others = Recording(), Recording()
    with ThreadPoolExecutor(1) as pool:
        with mine:
            assert refused(arguments)
            pool.submit(others.__enter__).result()
        # torch's own flag is for all threads, and says so for good.
        assert not refused(arguments)
        assert pool.submit(refused, arguments).result()
        pool.submit(others.__exit__, None, None, None).result()
    assert not refused(arguments)


def test_without_the_library_tensor_operations_decode(monkeypatch):
    arguments = make((7, 45), 3, 32, affine=True)
    monkeypatch.setattr(native, "load", lambda: native.Kernels(None, "LOFTQ_NATIVE=0"))
    assert refused(arguments)
    assert same_bits(decode(Packed(*arguments)), expected(arguments, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 1), 32),
        ((10, 45), 32),
        ((24, 64), 64),
        ((300, 33), 64),
        ((270, 100), 256),
        ((512, 2100), 64),
        ((40, 2049), 128),
    ],
)
def test_the_trellis_code_is_decoded_to_the_bits_of_tensor_operations(shape, size, dtype):
    generator = torch.Generator().manual_seed(0)
    count = shape[0] * shape[1]
    codes = torch.randint(256, (packed_length(count, 2),), generator=generator).byte()
    scales = torch.randn(-(-count // size), generator=generator)
    packed = Packed(shape, 2, size, codes, scales, None, trellis_code.levels(torch.device("cpu")))
    found = native_decoding.decode(packed, dtype)
    assert found is not None
    assert torch.equal(found, packed.unpacked().decode().to(dtype))
    short = replace(packed, scales=scales[:-1])
    assert native_decoding.decode(short, dtype) is None


FORK = """
import os, torch
from loftq_cli.kernels import native
from loftq_cli.numerics.quantizers import native_decoding
from loftq_cli.numerics.quantizers.packed import Packed
torch.set_num_threads(2)
native_decoding._ONE_THREAD = 0
packed, scales, levels = torch.arange(64, dtype=torch.uint8), torch.ones(4), torch.arange(4.0)

def decoded():
    packed_matrix = Packed((4, 64), 2, 64, packed, scales, None, levels)
    return native_decoding.decode(packed_matrix, torch.float32)

before = decoded()
done = []
native.divide(lambda first, last: done.append(last - first), 100)
child = os.fork()
if child == 0:
    native.divide(lambda first, last: done.append(last - first), 100)
    os._exit(0 if sum(done) == 200 and torch.equal(decoded(), before) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_starts_threads_of_its_own():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=60)


def test_an_error_of_any_range_is_raised(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)

    def work(first, last):
        if last == 100:
            raise MemoryError

    with pytest.raises(MemoryError):
        native.divide(work, 100)
