"""Layout ``loftq``: bytes worked by hand from docs/output-format.md."""

from __future__ import annotations

import pytest
import torch

from loftq_cli.layouts.base import Matrix, Surroundings
from loftq_cli.layouts.loftq import PackedLayout
from loftq_cli.numerics.quantizers.blocks import Quantized
from loftq_cli.numerics.quantizers.scale_storage import ScaleDtype
from tests.support import plain_layouts as plain
from tests.support.stored import drawn

# Ten codes of a 2 x 5 matrix in blocks of 4, and their bytes: code k takes bits k*N to k*N + N - 1.
CODES = {
    2: [1, 2, 3, 0, 1, 3, 3, 0, 2, 1],
    3: [1, 2, 3, 4, 5, 6, 7, 0, 7, 1],
    4: [1, 2, 15, 0, 9, 8, 7, 3, 10, 5],
    8: [0, 255, 7, 128, 1, 2, 3, 254, 4, 200],
}
BYTES = {
    2: [0b00_11_10_01, 0b00_11_11_01, 0b01_10],
    3: [0b11_010_001, 0b0_101_100_0, 0b000_111_11, 0b001_111],
    4: [0x21, 0x0F, 0x89, 0x37, 0x5A],
    8: [0, 255, 7, 128, 1, 2, 3, 254, 4, 200],
}
# Codebook: blocks of 4 run over the flattened matrix, 4 + 4 + 2 elements; level c is the number c.
SCALES = [2.0, -4.0, 8.0]
CODEBOOK_VALUES = {
    2: [[2, 4, 6, 0, -4], [-12, -12, 0, 16, 8]],
    3: [[2, 4, 6, 8, -20], [-24, -28, 0, 56, 8]],
    4: [[2, 4, 30, 0, -36], [-32, -28, -12, 80, 40]],
    8: [[0, 510, 14, 256, -4], [-8, -12, -1016, 32, 1600]],
}
# Affine: groups of 4 run along each row, 4 + 1 elements; (code - zero) * scale.
GROUP_SCALES = [0.5, 2.0, 1.0, 4.0]
ZEROS = {2: [1, 2, 3, 1], 3: [1, 4, 7, 2], 4: [1, 15, 8, 3], 8: [1, 255, 8, 3]}
ZERO_BYTES = {
    2: [0b01_11_10_01],
    3: [0b11_100_001, 0b010_1],
    4: [0xF1, 0x38],
    8: [1, 255, 8, 3],
}
AFFINE_VALUES = {
    2: [[0, 0.5, 1, -0.5, -2], [0, 0, -3, -1, 0]],
    3: [[0, 0.5, 1, 1.5, 2], [-1, 0, -7, 0, -4]],
    4: [[0, 0.5, 7, -0.5, -12], [0, -1, -5, 2, 8]],
    8: [[-0.5, 127, 3, 63.5, -508], [-6, -5, 246, -4, 788]],
}
every_width = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def uint8(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


@every_width
def test_golden_bytes_with_a_codebook(bits):
    matrix = Matrix("m.weight", (2, 5), "F32", "nf", bits, 4)
    levels = torch.arange(2**bits, dtype=torch.float32)
    quantized = Quantized(
        bits, 4, uint8(CODES[bits]).view(2, 5), torch.tensor(SCALES), None, levels
    )
    tensors = PackedLayout().encode(matrix, quantized)
    assert list(tensors) == ["m.weight", "m.weight_scales", "m.weight_levels"]
    assert tensors["m.weight"].tolist() == BYTES[bits]
    assert tensors["m.weight_scales"].tolist() == SCALES
    assert tensors["m.weight_levels"].tolist() == list(range(2**bits))
    assert PackedLayout().decode(matrix, tensors).tolist() == CODEBOOK_VALUES[bits]


@every_width
def test_golden_bytes_with_zero_points(bits):
    matrix = Matrix("m.weight", (2, 5), "F32", "uniform", bits, 4)
    codes, scales = uint8(CODES[bits]).view(2, 5), torch.tensor(GROUP_SCALES)
    tensors = PackedLayout().encode(matrix, Quantized(bits, 4, codes, scales, uint8(ZEROS[bits])))
    assert list(tensors) == ["m.weight", "m.weight_scales", "m.weight_zeros"]
    assert tensors["m.weight"].tolist() == BYTES[bits]
    assert tensors["m.weight_scales"].tolist() == GROUP_SCALES
    assert tensors["m.weight_zeros"].tolist() == ZERO_BYTES[bits]
    assert PackedLayout().decode(matrix, tensors).tolist() == AFFINE_VALUES[bits]


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.view(torch.uint8).tolist())


def test_golden_bytes_of_scales_in_bfloat16():
    matrix = Matrix("m.weight", (2, 5), "F32", "nf", 2, 4)
    codes, levels = uint8(CODES[2]).view(2, 5), torch.arange(4, dtype=torch.float32)
    layout = PackedLayout("bfloat16")
    tensors = layout.encode(matrix, Quantized(2, 4, codes, torch.tensor(SCALES), None, levels))
    assert list(tensors) == ["m.weight", "m.weight_scales", "m.weight_levels"]
    # 2.0 is 0x4000, -4.0 is 0xC080, 8.0 is 0x4100.
    assert raw(tensors["m.weight_scales"]) == bytes.fromhex("0040 80C0 0041")
    assert layout.decode(matrix, tensors).tolist() == CODEBOOK_VALUES[2]


@pytest.mark.parametrize("method", ["nf", "uniform"])
def test_golden_bytes_of_scales_in_int8(method):
    # Rows of 33 blocks of 4: the first 64 scales, of two rows, share a step of 0.25, the other two
    # one of 2.0. The largest scale of each is 127 steps.
    matrix = Matrix("m.weight", (2, 132), "F32", method, 2, 4)
    scales = [31.75, -4.0, 0.0, 0.25] + [0.5] * 60 + [2.0, -254.0]
    quantized = Quantized(
        *(2, 4, torch.ones(2, 132, dtype=torch.uint8), torch.tensor(scales)),
        zeros=uint8([2] * 66) if method == "uniform" else None,
        levels=torch.tensor([-1.0, -0.5, 0.0, 1.0]) if method == "nf" else None,
    )
    layout = PackedLayout("int8")
    tensors = layout.encode(matrix, quantized)
    last = "m.weight_zeros" if method == "uniform" else "m.weight_levels"
    assert list(tensors) == ["m.weight", "m.weight_scales", "m.weight_scale_steps", last]
    assert tensors["m.weight"].tolist() == [0b01_01_01_01] * 66
    assert raw(tensors["m.weight_scales"]) == bytes([0x7F, 0xF0, 0, 1] + [2] * 60 + [1, 0x81])
    assert raw(tensors["m.weight_scale_steps"]) == bytes.fromhex("803E 0040")
    value = -0.5 if method == "nf" else -1
    expected = [[value * scale] * 4 for scale in scales]
    assert layout.decode(matrix, tensors).view(66, 4).tolist() == expected


@pytest.mark.parametrize("scales", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("method", ["nf", "uniform-block", "uniform-tensor", "uniform"])
@pytest.mark.parametrize(
    ("bits", "block_size", "shape"),
    [(2, 32, (3, 70)), (2, 32, (70, 70)), (3, 64, (5, 33)), (8, 32, (1, 31))],
)
def test_the_plain_decoder_reads_it(method, bits, block_size, shape, scales):
    matrix, layout = (
        Matrix("m.weight", shape, "F32", method, bits, block_size),
        PackedLayout(scales),
    )
    quantized = drawn(matrix)
    tensors = layout.encode(matrix, quantized)
    entry = layout.quantization_config([matrix], Surroundings({}, [], []))["modules"]["m"]
    expected = torch.tensor(plain.loftq(tensors, "m.weight", shape, entry))
    assert torch.equal(layout.decode(matrix, tensors), expected)


@pytest.mark.parametrize("scales", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", [(3, 70), (30, 33), (70, 70), (300, 8)])
def test_the_plain_decoder_reads_the_trellis_code(shape, scales):
    matrix, layout = Matrix("m.weight", shape, "F32", "trellis", 2, 32), PackedLayout(scales)
    quantized = drawn(matrix)
    tensors = layout.encode(matrix, quantized)
    assert [spec.name for spec in layout.specs(matrix)] == list(tensors)
    assert "m.weight_levels" not in tensors
    entry = layout.quantization_config([matrix], Surroundings({}, [], []))["modules"]["m"]
    expected = torch.tensor(plain.loftq(tensors, "m.weight", shape, entry))
    assert torch.equal(layout.decode(matrix, tensors), expected)
    assert torch.equal(layout.quantized(matrix, tensors).codes, quantized.codes)


def test_one_block_for_the_whole_matrix():
    matrix = Matrix("m.weight", (2, 5), "F32", "uniform-tensor", 2, 64)
    tensors = {
        "m.weight": uint8(BYTES[2]),
        "m.weight_scales": torch.tensor([1.0]),
        "m.weight_levels": torch.tensor([-0.5, 0.0, 0.25, 2.0]),
    }
    assert [spec.shape for spec in PackedLayout().specs(matrix)] == [(3,), (1,), (4,)]
    assert PackedLayout().decode(matrix, tensors).tolist() == [
        [0.0, 0.25, 2.0, -0.5, 0.0],
        [2.0, 2.0, -0.5, 0.25, 0.0],
    ]


@pytest.mark.parametrize(
    ("method", "entry"),
    [
        ("nf", {"bits": 3, "block_size": 128, "decoding": "codebook"}),
        ("nf-symmetric", {"bits": 3, "block_size": 128, "decoding": "codebook"}),
        ("uniform-block", {"bits": 3, "block_size": 128, "decoding": "codebook"}),
        ("uniform-tensor", {"bits": 3, "block_size": 0, "decoding": "codebook"}),
        ("uniform", {"bits": 3, "block_size": 128, "decoding": "affine"}),
        ("trellis", {"bits": 2, "block_size": 128, "decoding": "trellis"}),
    ],
)
def test_the_config_says_how_each_module_is_decoded(method, entry):
    matrix = Matrix("h.0.m.weight", (2, 5), "F32", method, entry["bits"], 128)
    stored: dict[ScaleDtype, dict[str, str]] = {
        "float32": {},
        "bfloat16": {"scales": "bfloat16"},
        "int8": {"scales": "int8"},
    }
    for scales, key in stored.items():
        config = PackedLayout(scales).quantization_config([matrix], Surroundings({}, [], ["h"]))
        modules = {"h.0.m": {**entry, **key}}
        assert config == {"quant_method": "loftq", "format_version": 1, "modules": modules}
