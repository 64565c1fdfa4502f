"""Error feedback, in the kernel and in tensor operations: every code that is chosen, in float64."""

from __future__ import annotations

import pytest
import torch

from loftq_cli.kernels import native
from loftq_cli.numerics import native_feedback
from loftq_cli.numerics.alternation import make_sweep
from loftq_cli.numerics.decomposition import Procedure
from loftq_cli.numerics.feedback import Feedback, requantize
from loftq_cli.numerics.quantizers.blocks import Parameters, Quantized
from loftq_cli.numerics.quantizers.methods import make_quantizer
from loftq_cli.numerics.sweep import Product, Sweep, as_stored
from tests.support.quantizing import gaussian, needs_kernels, quantizer_of
from tests.support.synthetic import llm_like

RANK = 6
SHAPES = ((70, 200), (64, 128), (3, 333), (130, 64), (1, 20))  # groups of 64 rows, panels of 64
QUANTIZERS = (
    *(
        ("nf", 2),
        ("nf", 3),
        ("nf", 4),
        ("nf", 8),
        ("nf-symmetric", 2),
        ("fitted", 3),
        ("iq4-nl", 4),
    ),
    *(("uniform", 2), ("uniform", 8), ("uniform-symmetric", 3)),
)
kernel_or_not = pytest.mark.parametrize(
    "kernel", [False, pytest.param(True, marks=needs_kernels)], ids=["tensor", "kernel"]
)


class Case:
    """A matrix of ``shape``, quantized at the scales of a first pass with errors fed back."""

    def __init__(
        self,
        kernel: bool,
        shape: tuple[int, int] = (70, 200),
        method: str = "nf",
        bits: int = 2,
        products: torch.dtype = torch.float32,
        dtype: torch.dtype = torch.float32,
        block_size: int = 64,
        store: torch.dtype | None = None,
    ) -> None:
        rows, columns = shape
        self.weight = llm_like(rows, columns).to(dtype)
        self.product = Product(
            gaussian(rows, RANK, seed=1) / 9, gaussian(RANK, columns, seed=2) / 9
        )
        search = "mse-native" if kernel else "mse"
        quantizer = quantizer_of(method, bits, block_size, search)
        settings = Procedure(rank=RANK, iters=1, products=products, backbone_dtype=store)
        self.sweep: Sweep = make_sweep(self.weight, quantizer, settings)
        self.order = torch.randperm(columns, generator=torch.Generator().manual_seed(3))
        factor = gaussian(columns, columns, seed=4).triu(1) / columns**0.5
        self.factor = (factor + torch.eye(columns)).to(products)
        given = self.sweep.quantize(None, self.product).quantized
        assert native_feedback.can_run(self.sweep.quantizer, self.factor) == kernel
        self.quantized, self.squared = requantize(
            self.sweep,
            self.weight,
            Parameters(given.scales, given.zeros),
            self.product,
            Feedback(self.order, self.factor),
            store,
        )
        self.values = as_stored(self.quantized.decode(), store)

    def excess(self) -> torch.Tensor:
        """How much farther than the nearest value the chosen one is from what was wanted, (out,
        in), in units of what float32, or errors in bfloat16, may be off."""
        target = self.weight.double() - self.product.left.double() @ self.product.right.double()
        errors = (target - self.values)[:, self.order]
        above = self.factor.double().triu(1)
        wanted = torch.empty_like(target)
        wanted[:, self.order] = target[:, self.order] + errors @ above.T
        off = torch.empty_like(target)
        off[:, self.order] = errors.abs() @ above.abs().T
        unit = 2.0**-8 if self.factor.dtype == torch.bfloat16 else 2.0**-20
        tables = levels(self.quantized)  # codes are chosen before values are rounded
        nearest = (wanted[..., None] - tables).abs().amin(dim=-1)
        excess = (wanted - self.quantized.decode().double()).abs() - nearest
        return excess / (unit * (off + wanted.abs() + tables.abs().amax(dim=-1)))


def levels(quantized: Quantized) -> torch.Tensor:
    """What every element may be, float64 (out, in, levels), by decoding each code everywhere."""
    tables = []
    for code in range(2**quantized.bits):
        codes = torch.full_like(quantized.codes, code)
        same = Quantized(
            quantized.bits,
            quantized.block_size,
            codes,
            quantized.scales,
            quantized.zeros,
            quantized.levels,
        )
        tables.append(same.decode().double())
    return torch.stack(tables, dim=-1)


@kernel_or_not
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["nf", "uniform"])
def test_every_code_is_the_nearest_to_what_errors_so_far_ask_for(kernel, shape, products, method):
    case = Case(kernel and _can(products), shape, method, products=products)
    assert case.excess().max() < 1
    residual = case.weight.double() - case.values
    assert torch.equal(case.sweep.residual, (case.weight - case.values))
    assert torch.equal(case.sweep.narrow, case.sweep.residual.to(products))
    assert case.squared == pytest.approx(float(residual.square().sum()), rel=1e-6)


@kernel_or_not
@pytest.mark.parametrize(("method", "bits"), QUANTIZERS)
@pytest.mark.parametrize("block_size", [16, 64])
def test_it_does_so_with_every_quantizer(kernel, method, bits, block_size):
    case = Case(kernel, (20, 120), method, bits, block_size=block_size)
    assert case.excess().max() < 1
    assert len(case.quantized.codes.unique()) > 3


@kernel_or_not
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["nf", "uniform"])
def test_it_takes_and_stores_16_bits(kernel, dtype, method):
    for store in (None, dtype):
        assert Case(kernel, (40, 70), method, 3, dtype=dtype, store=store).excess().max() < 1


@needs_kernels
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_does_not_depend_on_the_threads(products):
    if not _can(products):
        pytest.skip("no products of bfloat16 here")
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(Case(True, (300, 200), "uniform", products=products))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(other.quantized.codes, found[0].quantized.codes)
        assert torch.equal(other.sweep.residual, found[0].sweep.residual)
        assert other.squared == found[0].squared


@needs_kernels
def test_it_takes_what_it_can_alone():
    for method in ("uniform-block", "uniform-tensor"):
        quantizer = make_quantizer(method, 2, 64, "fixed", native=True)
        assert not native_feedback.can_run(quantizer, torch.eye(8))
    quantizer = make_quantizer("nf", 2, 64, "mse", native=True)
    assert native_feedback.can_run(quantizer, torch.eye(8))
    assert not native_feedback.can_run(quantizer, torch.eye(8).half())
    assert not native_feedback.can_run(make_quantizer("nf", 2, 64, "mse"), torch.eye(8))


def _can(products: torch.dtype) -> bool:
    return products == torch.float32 or bool(native.function("loftq_feedback_in_pairs")())
