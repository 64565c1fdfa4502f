"""Sweeps with scales that are rounded between two passes, by the compiled kernels and in tensor
operations; and what rounding keeps whatever the scales."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_cli.errors import InputError
from loftq_cli.numerics import sweep as sweeps
from loftq_cli.numerics.alternation import decompose, make_sweep
from loftq_cli.numerics.decomposition import Procedure
from loftq_cli.numerics.native_sweep import NativeSweep
from loftq_cli.numerics.quantizers.blocks import Parameters
from loftq_cli.numerics.quantizers.methods import make_quantizer
from loftq_cli.numerics.quantizers.scale_storage import pack_scales, round_scales, unpack_scales
from loftq_cli.numerics.sweep import Product
from tests.support.quantizing import (
    PROPERTY,
    SEARCHES,
    WIDTHS,
    gaussian,
    needs_kernels,
    prepared,
    quantizer_of,
)
from tests.support.synthetic import llm_like

every_search = pytest.mark.parametrize("scale", ["absmax", *SEARCHES])
every_storage = pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
SHAPES = [(64, 256), (37, 192), (33, 100), (1, 300), (5, 7)]

# Every float32 there is, subnormals among them.
any_float = st.floats(width=32, allow_nan=False, allow_infinity=False)
any_scales = st.lists(any_float, min_size=1, max_size=200)


@PROPERTY
@given(values=any_scales)
def test_packing_what_was_unpacked_gives_the_same_bytes(values):
    codes, steps = pack_scales(torch.tensor(values), "int8")
    assert steps is not None
    again, same = pack_scales(unpack_scales(codes, steps), "int8")
    assert same is not None
    assert torch.equal(again, codes)
    assert torch.equal(same, steps)
    assert len(codes) == len(values)
    assert len(steps) == -(-len(values) // 64)


@PROPERTY
@given(values=any_scales)
def test_every_group_reaches_127_and_no_sign_is_lost(values):
    scales = torch.tensor(values)
    codes, steps = pack_scales(scales, "int8")
    assert steps is not None
    for group, of_group, step in zip(scales.split(64), codes.split(64), steps, strict=True):
        assert torch.equal(step, (group.abs().max() / 127).bfloat16())
        if step == 0:
            assert not bool(of_group.any())
        else:
            assert int(of_group.int().abs().max()) == 127
            assert torch.equal(of_group.sign().float(), group.sign())
            assert bool(torch.isfinite(unpack_scales(of_group, step.view(1))).all())
            exact = of_group.double() * step.double()
            assert torch.equal(unpack_scales(of_group, step.view(1)).double(), exact)


def test_scales_that_are_stored_in_float32_are_left_alone():
    scales = gaussian(70)
    assert round_scales(scales, "float32") is scales


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("method", "bits"),
    [
        *itertools.product(["nf", "nf-symmetric", "uniform"], WIDTHS),
        *itertools.product(["fitted"], (2, 3, 4)),
    ],
)
def test_at_given_scales_the_kernels_choose_the_codes_of_the_tensor_operations(method, bits, shape):
    weight = llm_like(*shape)
    quantizer = prepared(quantizer_of(method, bits, 32, "mse-native"), weight)
    fitted = quantizer.fit(weight, None).parameters
    scales = fitted.scales * (1 + 0.1 * gaussian(fitted.scales.numel(), seed=3))
    scales[::5] = 0
    given = Parameters(scales, fitted.zeros)
    ours = quantizer.encode(weight, given)
    sweep = NativeSweep(weight, quantizer, torch.float32, None)
    theirs = sweep._quantize(given, None, fixed=True).quantized
    assert torch.equal(theirs.codes, ours.codes)
    assert torch.equal(theirs.scales, given.scales)
    if given.zeros is not None:
        assert torch.equal(theirs.zeros, given.zeros)
    assert torch.equal(sweep.residual, weight - ours.values)
    assert torch.equal(theirs.decode(), ours.values)


@every_search
@every_storage
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["nf", "uniform"])
def test_both_passes_leave_what_one_would(scale, dtype, shape, method):
    weight = llm_like(*shape)
    settings = Procedure(rank=1, iters=1, scale_dtype=dtype, products=torch.bfloat16)
    sweep = make_sweep(weight, quantizer_of(method, 2, 32, scale), settings)
    first = sweep.quantize(None, None)
    before = sweep.residual.clone()
    assert torch.equal(before, weight - first.quantized.decode())
    product = Product(gaussian(shape[0], 3) * 0.003, gaussian(3, shape[1], seed=1))
    start = Parameters(first.quantized.scales, first.quantized.zeros)
    second = sweep.quantize(start, product)
    delta = product.left.double() @ product.right.double()
    # Of the residual that was there before either pass.
    expected = float((before.double() - delta).square().sum())
    assert second.previous == pytest.approx(expected, rel=1e-5)
    assert torch.equal(sweep.residual, weight - second.quantized.decode())
    assert torch.equal(sweep.narrow, sweep.residual.bfloat16())
    squares = float(sweep.residual.double().square().sum())
    assert second.squared == pytest.approx(squares, rel=1e-6)
    scales = second.quantized.scales
    assert torch.equal(round_scales(scales, dtype), scales)


@every_storage
@pytest.mark.parametrize("scale", ["absmax", "mse"])
@pytest.mark.parametrize("method", ["nf", "uniform"])
def test_where_a_pass_is_cut_does_not_matter(monkeypatch, method, scale, dtype):
    weight = llm_like(48, 96)  # 3 blocks a row: a group of 64 is 21 rows and a block
    settings = Procedure(rank=1, iters=1, scale_dtype=dtype)
    found = []
    for elements in (1 << 19, 96, 500):
        monkeypatch.setattr(sweeps, "_CHUNK_ELEMENTS", elements)
        sweep = make_sweep(weight, quantizer_of(method, 3, 32, scale), settings)
        found.append(sweep.quantize(None, None).quantized)
    for other in found[1:]:
        assert torch.equal(other.codes, found[0].codes)
        assert torch.equal(other.scales, found[0].scales)


@every_storage
def test_the_authors_own_uniform_takes_scales_as_stored(dtype):
    weight = llm_like(40, 96)
    settings = Procedure(rank=4, iters=2, scale_dtype=dtype)
    d = decompose(weight, make_quantizer("uniform-block", 2, 64, "fixed"), settings)
    assert torch.equal(round_scales(d.quantized.scales, dtype), d.quantized.scales)


def test_uniform_tensor_has_no_scales_to_round():
    weight = llm_like(8, 64)
    quantizer = prepared(make_quantizer("uniform-tensor", 2, 64, "fixed"), weight)
    with pytest.raises(ValueError, match="no scales"):
        quantizer.encode(weight, Parameters(torch.ones(1), None))


def test_a_scale_that_bfloat16_cannot_hold_is_an_error():
    weight = torch.full((4, 64), torch.finfo(torch.float32).max)
    quantizer = quantizer_of("nf", 4, 64, "absmax")
    with pytest.raises(InputError, match="the quantized matrix is too large"):
        decompose(weight, quantizer, Procedure(rank=1, iters=0, scale_dtype="bfloat16"))
    held = decompose(weight, quantizer, Procedure(rank=1, iters=0, scale_dtype="int8"))
    assert held.final < 1e-3 * held.weight_norm
