"""Quantized matrices made of drawn codes, and every kind of matrix that there is."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from loftq_cli.layouts.base import Matrix
from loftq_cli.numerics.quantizers import trellis_code
from loftq_cli.numerics.quantizers.blocks import Quantized
from loftq_cli.numerics.quantizers.codebooks import evenly_spaced, normal_float
from loftq_cli.numerics.quantizers.methods import method
from loftq_cli.numerics.quantizers.portable import portable as rounded

BITS = (2, 3, 4, 8)
CODEBOOKS = ("nf", "nf-symmetric", "uniform-block")


def drawn(matrix: Matrix, *, portable: bool = False, seed: int = 0) -> Quantized:
    """Random codes, scales and zero points for ``matrix``, every value of them possible."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = matrix.shape
    top = 2**matrix.bits

    def codes(lowest: int, *shape: int) -> torch.Tensor:
        return torch.randint(lowest, top, shape, generator=generator).to(torch.uint8)

    def scales(count: int) -> torch.Tensor:
        values = torch.randn(count, generator=generator)
        return rounded(values) if portable else values

    size = matrix.block_size
    body = codes(0, rows, columns)
    if method(matrix.method).decoding == "affine":
        count = rows * -(-columns // size)
        zeros = codes(1, count)
        if method(matrix.method).symmetric:
            zeros.fill_(top // 2)
        return Quantized(matrix.bits, size, body, scales(count), zeros)
    if matrix.method == "uniform-tensor":
        levels = torch.linspace(-0.3, 0.4, top)
        return Quantized(matrix.bits, 0, body, scales(1), None, levels)
    if method(matrix.method).decoding == "trellis":
        count = -(-rows * columns // size)
        table = trellis_code.levels(torch.device("cpu"))
        return Quantized(matrix.bits, size, body, scales(count), None, table)
    levels = evenly_spaced(matrix.bits)
    if matrix.method != "uniform-block":
        levels = normal_float(matrix.bits, symmetric=matrix.method == "nf-symmetric")
    return Quantized(matrix.bits, size, body, scales(-(-rows * columns // size)), None, levels)


@st.composite
def matrices(draw: st.DrawFn, layout: str) -> Matrix:
    """Any matrix that ``layout`` can hold."""
    affine = ["uniform", "uniform-symmetric"]
    method = draw(st.sampled_from([*CODEBOOKS, *affine, "uniform-tensor"]))
    bits, size = draw(st.sampled_from(BITS)), draw(st.sampled_from([32, 64, 128, 256]))
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 300))
    if layout == "bnb":
        method, bits, size, columns = "nf", 4, 64, 64 * draw(st.integers(1, 4))
    if layout == "compressed":
        method, size = draw(st.sampled_from(affine)), min(size, 128)
        rows, columns = 8 + rows, size * draw(st.integers(1, 4))
    if layout == "awq":
        method, bits, size = draw(st.sampled_from(affine)), 4, min(size, 128)
        rows, columns = 8 * draw(st.integers(1, 5)), size * draw(st.integers(1, 4))
    if layout == "gptq":
        method, size = draw(st.sampled_from(affine)), min(size, 128)
        rows, columns = 32 * draw(st.integers(1, 3)), 32 * draw(st.integers(1, 9))
    dtype = draw(st.sampled_from(["F32", "F16", "BF16"]))
    return Matrix("model.layers.0.proj.weight", (rows, columns), dtype, method, bits, size)
