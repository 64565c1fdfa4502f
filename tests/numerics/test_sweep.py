"""The passes over a matrix, by the compiled kernels and in tensor operations, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from loftq_cli.errors import ScaleRangeError
from loftq_cli.numerics.alternation import make_sweep
from loftq_cli.numerics.decomposition import Procedure
from loftq_cli.numerics.native_sweep import NativeSweep
from loftq_cli.numerics.quantizers.blocks import Parameters
from loftq_cli.numerics.quantizers.portable import is_portable
from loftq_cli.numerics.sweep import Product, Sweep, TensorSweep
from tests.support.quantizing import SEARCHES, gaussian, needs_kernels, quantizer_of
from tests.support.synthetic import llm_like

every_search = pytest.mark.parametrize("scale", SEARCHES)
# Rows and columns that fill no tile (4 x 64), columns that no block divides, a single row, one that
# needs many rows until a block begins with a row.
every_shape = pytest.mark.parametrize(
    "shape", [(64, 256), (37, 192), (33, 100), (1, 300), (130, 65), (5, 7)], ids=str
)
every_method = pytest.mark.parametrize("method", ["nf", "uniform"])


def sweep_of(weight: torch.Tensor, method: str, scale: str, bits: int = 2, **settings) -> Sweep:
    chosen = Procedure(rank=1, iters=1, **settings)
    return make_sweep(weight, quantizer_of(method, bits, 32, scale), chosen)


def product_of(shape: tuple[int, int], rank: int) -> Product:
    rows, columns = shape
    scale = 0.005 / rank**0.5
    return Product(gaussian(rows, rank, seed=1) * scale, gaussian(rank, columns, seed=2))


def squares(matrix: torch.Tensor) -> float:
    return float(matrix.double().square().sum())


@every_search
@every_shape
@every_method
@pytest.mark.parametrize("rank", [1, 5, 64])
def test_a_sweep_quantizes_the_weight_less_the_product(scale, shape, method, rank):
    weight, product = llm_like(*shape), product_of(shape, rank)
    sweep = sweep_of(weight, method, scale)
    first = sweep.quantize(None, None)
    before = sweep.residual.clone()
    assert torch.equal(before, weight - first.quantized.decode())
    start = Parameters(first.quantized.scales, first.quantized.zeros)
    second = sweep.quantize(start, product)
    delta = product.left.double() @ product.right.double()
    values = second.quantized.decode()
    assert torch.equal(sweep.residual, weight - values)
    assert first.squared == pytest.approx(squares(before), rel=1e-6)
    assert second.previous == pytest.approx(squares(before.double() - delta), rel=1e-5)
    assert second.squared == pytest.approx(squares(weight - values), rel=1e-6)
    assert sweep.remainder(product) == pytest.approx(
        squares(sweep.residual.double() - delta), rel=1e-5
    )
    # What was quantized is the target: its own quantization from the same start is as good.
    target = (weight.double() - delta).float()
    own = sweep_of(target, method, scale)
    ours = squares(target.double() - values.double())
    assert ours == pytest.approx(own.quantize(start, None).squared, rel=1e-2)


@every_search
@every_shape
@every_method
@pytest.mark.parametrize("rank", [None, 3, 64], ids=["from-zero", "3", "64"])
def test_what_is_quantized_may_lie_beyond_the_product(scale, shape, method, rank):
    """The codes are those of a product that ends there; the residual of the step is not."""
    weight, product = llm_like(*shape), product_of(shape, 5)
    before = None if rank is None else product_of(shape, rank)
    there = Product(product.left * 1.7, product.right)
    if before is not None:
        left = torch.cat([product.left * 1.7, before.left * -0.7], dim=1)
        there = Product(left, torch.cat([product.right, before.right]))
    start, found = None, []
    for given in (there, replace(product, beyond=0.7, before=before)):
        sweep = sweep_of(weight, method, scale)
        first = sweep.quantize(None, None)
        residual = sweep.residual.double()
        start = Parameters(first.quantized.scales, first.quantized.zeros)
        found.append(sweep.quantize(start, given))
    delta = product.left.double() @ product.right.double()
    assert found[1].previous == pytest.approx(squares(residual - delta), rel=1e-5)
    codes = [swept.quantized.codes for swept in found]
    assert (codes[0] != codes[1]).double().mean() < 1e-3  # where rounding decides
    assert found[1].squared == pytest.approx(found[0].squared, rel=1e-4)


@every_search
@every_shape
@every_method
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_what_the_product_leaves_of_the_previous_residual_is_kept(
    scale, shape, method, products, scale_dtype
):
    weight, product = llm_like(*shape), product_of(shape, 5)
    sweep = sweep_of(weight, method, scale, products=products, scale_dtype=scale_dtype)
    sweep.quantize(None, None)
    before = sweep.residual.clone()
    sweep.remains = torch.empty_like(sweep.narrow)
    delta = product.left.double() @ product.right.double()
    tolerance: dict[str, Any] = {"rtol": 2e-6, "atol": 1e-7} if products == torch.float32 else {}
    sweep.quantize(None, product)
    expected = (before.double() - delta).to(products)
    torch.testing.assert_close(sweep.remains, expected, **tolerance)
    sweep.remains.zero_()
    sweep.remainder(product)
    expected = (sweep.residual.double() - delta).to(products)
    torch.testing.assert_close(sweep.remains, expected, **tolerance)


@every_search
@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_dense_backbone_is_rounded_before_it_is_subtracted(scale, method, dtype):
    weight = llm_like(40, 96) * torch.logspace(-4, 3, 40)[:, None]  # float16 subnormals too
    sweep = sweep_of(weight, method, scale, backbone_dtype=dtype)
    quantized = sweep.quantize(None, None).quantized
    assert torch.equal(sweep.residual, weight - quantized.decode().to(dtype).float())


@every_search
def test_the_wide_residual_is_the_residual_rounded_to_the_nearest(scale):
    sweep = sweep_of(llm_like(40, 96), "nf", scale, products=torch.bfloat16)
    sweep.quantize(None, None)
    assert sweep.narrow.dtype == torch.bfloat16
    assert torch.equal(sweep.narrow, sweep.residual.to(torch.bfloat16))


@every_search
def test_without_narrow_products_nothing_is_held_twice(scale):
    assert (sweep := sweep_of(llm_like(8, 64), "nf", scale)).narrow is sweep.residual
    exact = sweep_of(llm_like(8, 64), "nf", scale, svd="exact", products=torch.bfloat16)
    assert exact.narrow is exact.residual


@every_search
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_portable_scales_are_rounded_before_the_codes_are_chosen(scale, bits):
    weight = llm_like(40, 96) * torch.logspace(-2, 6, 40)[:, None]
    quantizer = quantizer_of("uniform", bits, 32, scale, portable=True)
    sweep = make_sweep(weight, quantizer, Procedure(rank=1, iters=1))
    quantized = sweep.quantize(None, None).quantized
    assert is_portable(quantized.scales)
    assert torch.equal(sweep.residual, weight - quantized.decode())
    rounded = (weight / quantized.scales.view(40, 3).repeat_interleave(32, 1)).round()
    zeros = quantized.zeros.float().view(40, 3).repeat_interleave(32, 1)
    expected = (rounded + zeros).clamp(0, 2**bits - 1).to(torch.uint8)
    assert torch.equal(quantized.codes, expected)


@every_search
@pytest.mark.parametrize("factor", [1e8, 1e-8])
def test_scales_outside_float16_are_refused(scale, factor):
    quantizer = quantizer_of("uniform", 2, 32, scale, portable=True)
    sweep = make_sweep(gaussian(8, 64) * factor, quantizer, Procedure(rank=1, iters=1))
    with pytest.raises(ScaleRangeError):
        sweep.quantize(None, None)


@needs_kernels
@every_method
def test_the_kernels_do_not_depend_on_the_number_of_threads(request, method):
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    weight, product = llm_like(300, 1040), product_of((300, 1040), 8)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        sweep = sweep_of(weight, method, "mse-native", products=torch.bfloat16)
        sweep.quantize(None, None)
        swept = sweep.quantize(None, product)
        sums = torch.tensor([swept.squared, swept.previous, sweep.remainder(product)])
        results.append((swept.quantized.codes, swept.quantized.scales, sweep.narrow, sums))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernels
def test_the_kernels_are_used_where_they_can_be():
    weight = llm_like(8, 64)
    assert isinstance(sweep_of(weight, "nf", "mse-native"), NativeSweep)
    for scale in ("mse", "absmax-native"):
        assert isinstance(sweep_of(weight, "nf", scale), TensorSweep)
