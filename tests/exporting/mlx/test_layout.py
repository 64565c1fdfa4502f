"""Codes as MLX stores them: its own words, an independent decoder, and what it cannot hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_cli.checkpoint.writer import spec_of
from loftq_cli.exporting.mlx.layout import MlxLayout
from loftq_cli.layouts.base import Matrix, Surroundings
from loftq_cli.numerics.quantizers.blocks import Quantized
from tests.support.makers import PROPERTY
from tests.support.stored import drawn

LAYOUT = MlxLayout()

# What mlx.core.quantize 0.32.4 makes of top - code for these codes (scale -1, bias top).
WORDS = {
    2: (0xB6C6DB13, 0x1B6C6DB1),
    3: (0x0E673147, 0x9CC55EAF, 0x157ABC39),
    4: (0xB16B050F, 0x27D27C16, 0x9E39E38D, 0x05AF5AF4),
    8: (
        *(0xF0F500FF, 0xDBE1E6EB, 0xC7CCD1D6, 0xB2B7BDC2),
        *(0x9EA3A8AD, 0x898E9399, 0x757A7F84, 0x60656A6F),
    ),
}


@pytest.mark.parametrize("bits", WORDS)
def test_the_words_are_mlx_s(bits: int) -> None:
    top = 2**bits - 1
    values = [(5 * i + i // 7) % (top + 1) for i in range(32)]
    values[:2] = 0, top
    codes = torch.tensor([[top - value for value in values]], dtype=torch.uint8)
    matrix = Matrix("m.weight", (1, 32), "F32", "uniform", bits, 32)
    quantized = Quantized(
        bits, 32, codes, torch.tensor([-1.0]), torch.tensor([top], dtype=torch.uint8)
    )
    tensors = LAYOUT.encode(matrix, quantized)
    words = tensors["m.weight"].view(torch.int32)[0].tolist()
    assert tuple(word % (1 << 32) for word in words) == WORDS[bits]
    assert tensors["m.biases"].item() == top
    assert LAYOUT.decode(matrix, tensors)[0].tolist() == values


def by_the_book(
    bits: int, words: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor
) -> torch.Tensor:
    """As mlx's documentation of quantize has it, in float64."""
    rows = []
    for row, scale, bias in zip(words.view(torch.int32).tolist(), scales, biases, strict=True):
        stream = sum((word % (1 << 32)) << (32 * place) for place, word in enumerate(row))
        count = 32 * len(row) // bits
        group = count // len(scale)
        rows.append(
            [
                float(scale[i // group]) * ((stream >> (bits * i)) % (1 << bits))
                + float(bias[i // group])
                for i in range(count)
            ]
        )
    return torch.tensor(rows, dtype=torch.float64)


@PROPERTY
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    size=st.sampled_from([32, 64, 128]),
    method=st.sampled_from(["uniform", "uniform-symmetric"]),
    tag=st.sampled_from(["F32", "F16", "BF16"]),
    seed=st.integers(0, 99),
)
def test_what_is_decoded_is_q(bits, size, method, tag, seed) -> None:
    """Exact in every dtype if symmetric; with zero points where the dtype has enough bits."""
    matrix = Matrix("m.weight", (3, 2 * size), tag, method, bits, size)
    assert LAYOUT.cannot_hold(matrix) is None
    quantized = drawn(matrix, portable=True, seed=seed)
    tensors = LAYOUT.encode(matrix, quantized)
    assert [spec_of(name, tensor) for name, tensor in tensors.items()] == LAYOUT.specs(matrix)
    found = LAYOUT.decode(matrix, tensors)
    expected = by_the_book(bits, *(tensors[f"m.{part}"] for part in ("weight", "scales", "biases")))
    assert torch.equal(found.double(), expected)
    fits = {"F32": True, "F16": bits <= 4, "BF16": False}[tag]
    if method == "uniform-symmetric" or fits:
        assert torch.equal(found, quantized.decode())
    else:  # a zero point of three does not fit bfloat16 any more
        torch.testing.assert_close(found, quantized.decode(), rtol=0.01, atol=0.02 * 2**bits)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("nf", 4, 64, "linear"), "uniform codes, not nf"),
        (("uniform", 4, 256, "linear"), "groups of 32, 64 or 128, not 256"),
        (("uniform", 4, 128, "linear"), "in_features 192 is not a multiple of 128"),
        (("uniform", 4, 64, "conv1d"), "transposes Conv1D"),
    ],
)
def test_what_mlx_cannot_hold(given, reason) -> None:
    method, bits, size, kind = given
    matrix = Matrix("m.weight", (8, 192), "F32", method, bits, size, kind)
    assert reason in (LAYOUT.cannot_hold(matrix) or "")
    assert not LAYOUT.holds_experts  # which mlx-lm stacks, under names of its own


def test_the_config_has_what_most_have_and_names_the_others() -> None:
    matrices = [
        Matrix(f"m.{number}.weight", (8, 128), "F32", "uniform", bits, size)
        for number, (bits, size) in enumerate([(4, 64), (2, 64), (4, 64), (4, 32)])
    ]
    assert LAYOUT.quantization_config(matrices, Surroundings({}, [], [])) == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "m.1": {"group_size": 64, "bits": 2},
        "m.3": {"group_size": 32, "bits": 4},
    }
