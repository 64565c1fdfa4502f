"""What holds for every layout: encode and decode are inverse, and specs() foretells encode()."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_cli.checkpoint.dtypes import torch_dtype
from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.checkpoint.writer import spec_of
from loftq_cli.layouts import registry
from loftq_cli.layouts.base import Layout, Matrix, Surroundings
from loftq_cli.numerics.quantizers.scale_storage import round_scales
from tests.support.makers import PROPERTY
from tests.support.stored import drawn, matrices

LAYOUTS = registry.names()
STORAGES = [(name, "float32") for name in LAYOUTS] + [("loftq", "bfloat16"), ("loftq", "int8")]


def made(name: str, scale_dtype: str = "float32", dense_dtype: str = "source") -> Layout:
    recipe = {"scale_dtype": scale_dtype, "dense_dtype": dense_dtype}
    return registry.make_layout(name, recipe)


@pytest.mark.parametrize(("name", "scales"), STORAGES)
@PROPERTY
@given(data=st.data())
def test_decoding_what_was_encoded_is_the_quantized_matrix(name, scales, data):
    layout = made(name, scale_dtype=scales)
    matrix = data.draw(matrices(name))
    assert layout.cannot_hold(matrix) is None
    quantized = drawn(matrix, portable=layout.portable, seed=data.draw(st.integers(0, 99)))
    if name == "loftq":
        quantized = replace(quantized, scales=round_scales(quantized.scales, scales))
    tensors = layout.encode(matrix, quantized)
    expected = quantized.decode()
    if layout.rounding(matrix) is not None:
        expected = expected.to(layout.rounding(matrix)).float()
    decoded = layout.decode(matrix, tensors)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, expected)
    assert [spec_of(key, tensor) for key, tensor in tensors.items()] == layout.specs(matrix)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dense_dtype", ["source", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source", ["F32", "F16", "BF16"])
def test_only_dense_rounds_the_matrix_itself(name, dense_dtype, source):
    matrix = Matrix("m.weight", (64, 64), source, "nf", 4, 64)
    rounding = made(name, dense_dtype=dense_dtype).rounding(matrix)
    if name != "dense":
        assert rounding is None
    elif dense_dtype == "source":
        assert rounding == torch_dtype(source)
    else:
        assert rounding == getattr(torch, dense_dtype)


def bits_per_weight(specs: list[TensorSpec], matrix: Matrix) -> float:
    return sum(spec.nbytes for spec in specs) * 8 / matrix.elements


BNB_STATE = '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 128]}'


def test_scales_in_fewer_bits_count_as_such():
    matrix = Matrix("m.weight", (64, 128), "F32", "uniform", 2, 64)
    stored = {
        scales: bits_per_weight(made("loftq", scale_dtype=scales).specs(matrix), matrix)
        for scales in ("float32", "bfloat16", "int8")
    }
    zeros = 2 / 64
    assert stored == {
        "float32": 2.5 + zeros,
        "bfloat16": 2.25 + zeros,
        "int8": 2 + 8 / 64 + 16 / 64**2 + zeros,
    }


@pytest.mark.parametrize(
    ("name", "method", "bits", "block_size", "nbytes"),
    [
        # 64 x 128 codes; scales; zero points, or tables and the like
        ("bnb", "nf", 4, 64, 4096 + 128 * 4 + 16 * 4 + len(BNB_STATE)),
        ("gptq", "uniform", 2, 64, 2048 + 128 * 2 + 128 * 2 // 8 + 128 * 4),
        ("gptq", "uniform", 3, 32, 3072 + 256 * 2 + 256 * 3 // 8 + 128 * 4),
        ("gptq", "uniform", 8, 128, 8192 + 64 * 2 + 64 + 128 * 4),
        ("gptq", "uniform-symmetric", 4, 64, 4096 + 128 * 2 + 128 * 4 // 8 + 128 * 4),
        ("awq", "uniform", 4, 64, 4096 + 128 * 2 + 128 * 4 // 8),
        ("compressed", "uniform", 3, 64, 3072 + 128 * 4 + 128 * 3 // 8 + 16),
        ("compressed", "uniform-symmetric", 4, 32, 4096 + 256 * 4 + 16),
        ("loftq", "uniform", 2, 64, 2048 + 128 * 4 + 128 * 2 // 8),
        ("loftq", "nf", 2, 64, 2048 + 128 * 4 + 4 * 4),
        ("loftq", "nf", 3, 256, 3072 + 32 * 4 + 8 * 4),
        ("loftq", "uniform-tensor", 8, 64, 8192 + 4 + 256 * 4),
        ("dense", "nf", 2, 64, 64 * 128 * 4),
    ],
)
def test_everything_stored_counts_towards_bits_per_weight(name, method, bits, block_size, nbytes):
    matrix = Matrix("m.weight", (64, 128), "F32", method, bits, block_size)
    specs = made(name).specs(matrix)
    assert bits_per_weight(specs, matrix) == nbytes * 8 / (64 * 128)


@pytest.mark.parametrize(
    ("name", "matrix", "reason"),
    [
        ("bnb", ((64, 64), "nf", 2, 64), "4-bit nf, not 2-bit nf"),
        ("bnb", ((64, 64), "uniform", 4, 64), "4-bit nf, not 4-bit uniform"),
        ("bnb", ((64, 64), "nf-symmetric", 4, 64), "4-bit nf, not 4-bit nf-symmetric"),
        ("bnb", ((64, 64), "nf", 4, 128), "blocks of 64, not 128"),
        ("bnb", ((64, 96), "nf", 4, 64), "in_features 96 is not a multiple of 64"),
        ("gptq", ((64, 64), "nf", 4, 64), "uniform codes, not nf"),
        ("gptq", ((64, 64), "uniform-block", 2, 64), "uniform codes, not uniform-block"),
        ("gptq", ((64, 64), "uniform-tensor", 2, 64), "uniform codes, not uniform-tensor"),
        ("gptq", ((64, 256), "uniform", 2, 256), "groups of 32, 64 or 128, not 256"),
        ("gptq", ((64, 40), "uniform", 2, 64), "in_features 40 x 2 bits"),
        ("gptq", ((64, 48), "uniform", 3, 64), "in_features 48 x 3 bits"),
        ("gptq", ((40, 64), "uniform", 2, 64), "out_features 40 x 2 bits"),
        ("gptq", ((2, 64), "uniform", 8, 64), "out_features 2 x 8 bits"),
        ("awq", ((64, 64), "nf", 4, 64), "4-bit uniform codes, not 4-bit nf"),
        ("awq", ((64, 64), "uniform", 3, 64), "4-bit uniform codes, not 3-bit uniform"),
        ("awq", ((64, 256), "uniform", 4, 256), "groups of 32, 64 or 128, not 256"),
        ("awq", ((64, 96), "uniform", 4, 64), "in_features 96 is not a multiple of 64"),
        ("awq", ((36, 64), "uniform", 4, 64), "out_features 36 is not a multiple of 8"),
    ],
)
def test_what_a_layout_cannot_hold(name, matrix, reason):
    shape, method, bits, block_size = matrix
    layout = made(name)
    found = layout.cannot_hold(Matrix("m.weight", shape, "F32", method, bits, block_size))
    assert found is not None
    assert reason in found
    for other in ("loftq", "dense"):
        assert made(other).cannot_hold(Matrix("m", shape, "F32", method, bits, 64)) is None


@pytest.mark.parametrize(
    ("stacks", "reason"),
    [
        (["model.layers"], None),
        (["decoder.block", "encoder.block"], "this model has: decoder.block, encoder.block"),
        ([], "this model has: none"),
    ],
)
def test_gptq_needs_one_stack_of_blocks(stacks, reason):
    surroundings = Surroundings({}, [], stacks)
    found = made("gptq").cannot_describe(surroundings)
    assert found is None if reason is None else reason in found
    for other in ("bnb", "loftq", "dense"):
        assert made(other).cannot_describe(surroundings) is None


def test_a_matrix_knows_its_module():
    matrix = Matrix("a.weight.weight", (3, 5), "F32", "nf", 4, 64)
    assert (matrix.module, matrix.elements) == ("a.weight", 15)
