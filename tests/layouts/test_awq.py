"""Layout ``awq`` against a decoder written from the format, and against gptqmodel's own."""

from __future__ import annotations

import warnings

import pytest
import torch

from loftq_cli.layouts.awq import AwqLayout
from loftq_cli.layouts.base import Matrix, Surroundings
from loftq_cli.numerics.quantizers.blocks import Quantized
from tests.support import plain_layouts as plain
from tests.support.stored import drawn

CASES = [(32, (64, 96)), (64, (8, 192)), (128, (96, 128))]


@pytest.mark.parametrize("method", ["uniform", "uniform-symmetric"])
@pytest.mark.parametrize(("group", "shape"), CASES)
def test_the_formats_own_decoder_reads_it(group, shape, method):
    matrix = Matrix("m.weight", shape, "F32", method, 4, group)
    quantized = drawn(matrix, portable=True)
    tensors = AwqLayout().encode(matrix, quantized)
    expected = torch.tensor(plain.awq(tensors, "m", group))
    assert torch.equal(quantized.decode(), expected)
    assert torch.equal(AwqLayout().decode(matrix, tensors), expected)


@pytest.mark.gptq
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("group", "shape"), CASES)
def test_gptqmodel_decodes_it_bit_for_bit(group, shape, dtype):
    """In float16, too: 7 bits of a portable scale times 4 of a code fit its 11."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, while importing
        packing = pytest.importorskip("gptqmodel.quantization.awq.utils.packing_utils")
    matrix = Matrix("m.weight", shape, "F32", "uniform", 4, group)
    quantized = drawn(matrix, portable=True)
    tensors = AwqLayout().encode(matrix, quantized)
    qweight, qzeros, scales = (tensors[f"m.{name}"] for name in ("qweight", "qzeros", "scales"))
    decoded = packing.dequantize_gemm(qweight, qzeros, scales.to(dtype), 4, group)
    assert torch.equal(decoded.T.float(), quantized.decode())
    codes = quantized.codes.int().T
    packed = packing.pack_awq(codes, quantized.zeros.view(shape[0], -1).int().T, 4)
    assert torch.equal(packed[0], qweight)
    assert torch.equal(packed[1], qzeros)


def test_the_bytes_are_those_of_the_format():
    codes = torch.arange(8, dtype=torch.uint8)[:, None].repeat(1, 32)
    zeros = torch.full((8,), 15, dtype=torch.uint8)
    matrix = Matrix("m.weight", (8, 32), "F16", "uniform", 4, 32)
    tensors = AwqLayout().encode(matrix, Quantized(4, 32, codes, torch.ones(8), zeros))
    assert tensors["m.qweight"].tolist() == [[0x75316420]] * 32
    assert tensors["m.qzeros"].tolist() == [[-1]]
    assert (tensors["m.scales"].dtype, tensors["m.scales"].shape) == (torch.float16, (1, 8))


def test_the_config_skips_nothing_that_is_quantized_for_transformers_or_vllm():
    """vLLM looks for the entries anywhere in a name: ``decoder`` would hit every layer of OPT."""
    names = [f"model.decoder.layers.{number}.fc1.weight" for number in range(2)]
    quantized = [Matrix(name, (64, 64), "F16", "uniform", 4, 32) for name in names]
    kept = ["model.decoder.layers.0.fc2", "lm_head"]
    config = AwqLayout().quantization_config(quantized, Surroundings({}, kept, []))
    skipped = config.pop("modules_to_not_convert")
    assert config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
    }
    assert {*kept, "score", "classifier"} <= {*skipped}
    assert not [entry for entry in skipped if any(entry in name for name in names)]
