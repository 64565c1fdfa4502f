"""Layout ``gptq`` against a decoder written from the format, and against gptqmodel's own."""

from __future__ import annotations

import warnings

import pytest
import torch

from loftq_cli.errors import CorruptFileError
from loftq_cli.layouts.base import Matrix, Surroundings
from loftq_cli.layouts.gptq import GptqLayout
from tests.support import plain_layouts as plain
from tests.support.stored import BITS, drawn

CASES = [
    (bits, group, shape)
    for bits in BITS
    for group, shape in ((32, (64, 96)), (64, (32, 160)), (128, (96, 128)))
]


def stored(
    bits: int, group: int, shape: tuple[int, int], method: str = "uniform"
) -> dict[str, torch.Tensor]:
    matrix = Matrix("m.weight", shape, "F32", method, bits, group)
    return GptqLayout().encode(matrix, drawn(matrix, portable=True))


@pytest.mark.parametrize(("bits", "group", "shape"), CASES)
def test_the_formats_own_decoder_reads_it(bits, group, shape):
    matrix = Matrix("m.weight", shape, "F32", "uniform", bits, group)
    quantized = drawn(matrix, portable=True)
    tensors = GptqLayout().encode(matrix, quantized)
    expected = torch.tensor(plain.gptq(tensors, "m", bits))
    assert torch.equal(quantized.decode(), expected)
    assert torch.equal(GptqLayout().decode(matrix, tensors), expected)


@pytest.mark.gptq
@pytest.mark.parametrize("method", ["uniform", "uniform-symmetric"])
@pytest.mark.parametrize(("bits", "group", "shape"), CASES)
def test_gptqmodel_decodes_it(bits, group, shape, method):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, while importing
        qlinear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
        from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
    tensors = stored(bits, group, shape, method)
    layer = qlinear.TorchLinear(
        bits=bits,
        group_size=group,
        sym=method == "uniform-symmetric",
        desc_act=False,
        in_features=shape[1],
        out_features=shape[0],
        bias=False,
        pack_dtype=torch.int32,
        register_buffers=True,
    )
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        buffer = getattr(layer, name)
        assert (buffer.shape, buffer.dtype) == (
            tensors[f"m.{name}"].shape,
            tensors[f"m.{name}"].dtype,
        )
        buffer.copy_(tensors[f"m.{name}"])
    convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    decoded = layer.dequantize_weight().T
    expected = torch.tensor(plain.gptq(tensors, "m", bits), dtype=torch.float16)
    assert torch.equal(decoded.half(), expected)


@pytest.mark.parametrize("bits", BITS)
def test_a_symmetric_config_says_so_and_its_zero_points_can_be_left_unread(bits):
    """What vLLM and SGLang do: code - 2^(bits - 1), whatever qzeros holds."""
    matrix = Matrix("m.weight", (64, 64), "F16", "uniform-symmetric", bits, 32)
    quantized = drawn(matrix, portable=True)
    tensors = GptqLayout().encode(matrix, quantized)
    config = GptqLayout().quantization_config([matrix], Surroundings({}, [], ["model.layers"]))
    assert config["sym"] is True
    scales = tensors["m.scales"].float().T.repeat_interleave(32, dim=1)
    assert torch.equal((quantized.codes.float() - 2 ** (bits - 1)) * scales, quantized.decode())
    words = {word % 2**32 for word in tensors["m.qzeros"].flatten().tolist()}
    stream = sum((2 ** (bits - 1) - 1) << (bits * k) for k in range(96 // bits))
    assert words == {(stream >> (32 * k)) % 2**32 for k in range(96 // 32 if bits == 3 else 1)}


@pytest.mark.parametrize("group", [-1, 2, 2**31 - 1])
def test_a_group_that_is_not_there_is_an_input_error(group):
    matrix = Matrix("m.weight", (32, 64), "F32", "uniform", 4, 32)
    tensors = stored(4, 32, (32, 64))
    tensors["m.g_idx"][5] = group
    with pytest.raises(CorruptFileError, match=r"m\.g_idx"):
        GptqLayout().decode(matrix, tensors)


@pytest.mark.parametrize(
    ("stack", "kept", "added"),
    [
        ("model.layers", ["lm_head"], {}),
        ("encoder.layer", [], {"block_name_to_quantize": "encoder.layer"}),
        (
            "model.layers",
            ["model.layers.0.b"],
            {"modules_in_block_to_quantize": [["model.layers.0.a", "model.layers.1.a"]]},
        ),
    ],
)
def test_the_config_is_what_transformers_reads(stack, kept, added):
    names = [f"model.layers.{number}.a.weight" for number in range(2)]
    quantized = [Matrix(name, (64, 64), "F32", "uniform", 3, 32) for name in names]
    config = GptqLayout().quantization_config(quantized, Surroundings({}, kept, [stack]))
    assert config == {
        "quant_method": "gptq",
        "bits": 3,
        "group_size": 32,
        "desc_act": False,
        "sym": False,
        "checkpoint_format": "gptq",
        **added,
    }
