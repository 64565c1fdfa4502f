"""The inner loops of quantization in C, compiled for this machine when they are first needed.

A block's scale search reads its 64 values about ten times. Written in tensor operations each of
these is a pass over memory; in C the block stays in registers, which is 10 to 40 times faster. The
source is kernels.c, the build takes a second and is kept in the user's cache; where there is no
compiler everything runs without it.

Set ``LOFTQ_NATIVE=0`` to do without, ``CC`` to choose the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("kernels.c")
# Reordered sums are wanted (they vectorize); NaN and Inf must keep their meaning. Not -ffast-math:
# up to GCC 12 a library linked with it flushes subnormals to zero in the whole process.
_FLAGS = (
    *("-O3", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"),
    *("-shared", "-fPIC", "-std=c11"),
)
_TUNING = (("-march=native",), ("-mcpu=native",), ())
_BLOCKS_PER_TASK = 2048

LARGEST_BLOCK = 256
"""Elements of a block that the kernels have room for."""


@dataclass(frozen=True)
class Kernels:
    """The loaded library, or why there is none."""

    library: ctypes.CDLL | None
    reason: str


@functools.cache
def load() -> Kernels:
    """Build or find the library. Never raises."""
    if os.environ.get("LOFTQ_NATIVE") == "0":
        return Kernels(None, "LOFTQ_NATIVE=0")
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        return Kernels(None, "no C compiler found")
    try:
        library = ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        return Kernels(None, f"the C kernels could not be built: {error}")
    return Kernels(library, "")


def available() -> bool:
    """Whether the compiled kernels can be used here."""
    return load().library is not None


def _build(compiler: str) -> Path:
    """Path of the shared library, from the cache or newly built. Raises OSError or
    SubprocessError."""
    source = _SOURCE.read_bytes()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(b"\0".join((source, version, repr(_FLAGS).encode(), _processor())))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loftq"
    target = cache / f"kernels-{key.hexdigest()[:24]}.so"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        built = Path(scratch) / "kernels.so"
        for tuning in _TUNING:
            command = [compiler, *_FLAGS, *tuning, "-o", str(built), str(_SOURCE), "-lm"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode == 0:
                os.replace(built, target)
                return target
    raise OSError(result.stderr.strip().splitlines()[-1] if result.stderr else "compiler failed")


def _processor() -> bytes:
    """What -march=native depends on: a cache shared between machines must not mix builds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    wanted = ("flags", "Features", "model name")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)})).encode()


def codebook(
    rows: torch.Tensor,
    size: int,
    levels: torch.Tensor,
    boundaries: torch.Tensor,
    cells: tuple[float, float, torch.Tensor, torch.Tensor],
    grid: torch.Tensor,
    refinements: int,
    start: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, scales, values) of float32 ``rows``, blocks of ``size`` over the flattened rows.

    ``cells``: lowest level, cells per unit, code (int32) and boundary (float32) of each cell.
    """
    flat = rows.contiguous().view(-1)
    blocks = -(-flat.numel() // size)
    codes = torch.empty(flat.shape, dtype=torch.uint8)
    values = torch.empty_like(flat)
    scales = torch.empty(blocks)
    lowest, per_cell, cell_code, cell_boundary = cells
    function = _function("loftq_codebook")

    def work(first: int, last: int) -> None:
        function(
            _pointer(flat),
            ctypes.c_int64(flat.numel()),
            ctypes.c_int64(size),
            ctypes.c_int64(first),
            ctypes.c_int64(last),
            _pointer(levels),
            _pointer(boundaries),
            ctypes.c_int(levels.numel()),
            ctypes.c_float(lowest),
            ctypes.c_float(per_cell),
            ctypes.c_int(cell_code.numel()),
            _pointer(cell_code),
            _pointer(cell_boundary),
            _pointer(grid),
            ctypes.c_int(grid.numel()),
            ctypes.c_int(refinements),
            _pointer(start),
            _pointer(codes),
            _pointer(scales),
            _pointer(values),
        )

    _divide(work, blocks)
    return codes.view(rows.shape), scales, values.view(rows.shape)


def uniform_fit(
    rows: torch.Tensor,
    size: int,
    bits: int,
    grid: torch.Tensor,
    refinements: int,
    start: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(absmax, scales, zeros), float32 (blocks,), of groups of ``size`` along each row."""
    rows = rows.contiguous()
    blocks = rows.shape[0] * -(-rows.shape[1] // size)
    absmax, scales, zeros = (torch.empty(blocks) for _ in range(3))
    function = _function("loftq_uniform_fit")

    def work(first: int, last: int) -> None:
        function(
            _pointer(rows),
            ctypes.c_int64(rows.shape[1]),
            ctypes.c_int64(size),
            ctypes.c_int64(first),
            ctypes.c_int64(last),
            ctypes.c_int(2**bits - 1),
            _pointer(grid),
            ctypes.c_int(grid.numel()),
            ctypes.c_int(refinements),
            _pointer(start),
            _pointer(absmax),
            _pointer(scales),
            _pointer(zeros),
        )

    _divide(work, blocks)
    return absmax, scales, zeros


def uniform_encode(
    rows: torch.Tensor, size: int, bits: int, scales: torch.Tensor, zeros: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, values) at the given float32 ``scales`` and ``zeros``."""
    rows = rows.contiguous()
    codes = torch.empty(rows.shape, dtype=torch.uint8)
    values = torch.empty_like(rows)
    function = _function("loftq_uniform_encode")

    def work(first: int, last: int) -> None:
        function(
            _pointer(rows),
            ctypes.c_int64(rows.shape[1]),
            ctypes.c_int64(size),
            ctypes.c_int64(first),
            ctypes.c_int64(last),
            ctypes.c_int(2**bits - 1),
            _pointer(scales),
            _pointer(zeros),
            _pointer(codes),
            _pointer(values),
        )

    _divide(work, scales.numel())
    return codes, values


def _function(name: str) -> Callable[..., None]:
    library = load().library
    assert library is not None
    function = getattr(library, name)
    function.restype = None
    return function  # type: ignore[no-any-return]


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _divide(work: Callable[[int, int], None], blocks: int) -> None:
    """Run ``work`` over ranges of blocks on as many threads as torch uses. ctypes releases the
    interpreter's lock, and blocks are independent: the result does not depend on the division."""
    threads = torch.get_num_threads()
    tasks = min(threads * 4, -(-blocks // _BLOCKS_PER_TASK))
    if threads == 1 or tasks <= 1:
        work(0, blocks)
        return
    edges: Sequence[int] = [blocks * number // tasks for number in range(tasks + 1)]
    list(_pool(threads).map(work, edges[:-1], edges[1:]))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="loftq-kernels")
