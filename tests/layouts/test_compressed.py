"""Layout compressed against compressed-tensors' own decoder, and what it says of a model."""

from __future__ import annotations

import pytest
import torch

from loftq_cli.errors import CorruptFileError
from loftq_cli.layouts.base import Matrix, Surroundings
from loftq_cli.layouts.compressed import CompressedLayout
from tests.support.stored import drawn

compressors = pytest.importorskip("compressed_tensors.compressors")
quantization = pytest.importorskip("compressed_tensors.quantization")

LAYOUT = CompressedLayout()
CASES = [
    (bits, group, shape)
    for bits in (2, 3, 4, 8)
    for group, shape in ((32, (13, 96)), (64, (33, 64)), (128, (64, 256)))
]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def theirs(matrix: Matrix, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight that compressed-tensors makes of it."""
    weights = quantization.QuantizationArgs(
        num_bits=matrix.bits,
        type="int",
        symmetric=matrix.method == "uniform-symmetric",
        strategy="group",
        group_size=matrix.block_size,
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    state = {name.removeprefix(f"{matrix.module}."): t for name, t in tensors.items()}
    return compressor.decompress(state, scheme)["weight"]


@pytest.mark.parametrize("method", ["uniform", "uniform-symmetric"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group", "shape"), CASES)
def test_compressed_tensors_decodes_it_bit_for_bit(bits, group, shape, dtype, method):
    matrix = Matrix("m.weight", shape, dtype, method, bits, group)
    quantized = drawn(matrix, portable=True)
    tensors = LAYOUT.encode(matrix, quantized)
    assert torch.equal(LAYOUT.decode(matrix, tensors), quantized.decode())
    # In 16 bits they round the one product of exact operands.
    assert torch.equal(theirs(matrix, tensors), quantized.decode().to(DTYPES[dtype]))


def test_golden_bytes():
    """Two rows of 32 codes of 3 bits, 0 to 7 over and over, the second row from 1 on."""
    matrix = Matrix("m.weight", (2, 32), "BF16", "uniform", 3, 32)
    quantized = drawn(matrix, portable=True)
    quantized.codes.copy_((torch.arange(32) + torch.arange(2)[:, None]) % 8)
    quantized.zeros.copy_(torch.tensor([4, 5]))
    quantized.scales.copy_(torch.tensor([0.5, -0.25]))
    tensors = LAYOUT.encode(matrix, quantized)
    first = sum((k % 8) << (3 * k) for k in range(32))
    second = sum(((k + 1) % 8) << (3 * k) for k in range(32))
    words = [[(stream >> (32 * k)) & 0xFFFFFFFF for k in range(3)] for stream in (first, second)]
    found = [[word & 0xFFFFFFFF for word in row] for row in tensors["m.weight_packed"].tolist()]
    assert found == words
    assert words[0][0] == 0b10_001_000_111_110_101_100_011_010_001_000
    assert tensors["m.weight_zero_point"].tolist() == [[4 + (5 << 3)]]
    assert tensors["m.weight_scale"].tolist() == [[0.5], [-0.25]]
    assert tensors["m.weight_shape"].tolist() == [2, 32]


def test_a_symmetric_matrix_has_no_zero_points():
    matrix = Matrix("m.weight", (64, 64), "F16", "uniform-symmetric", 4, 32)
    names = [spec.name for spec in LAYOUT.specs(matrix)]
    assert names == ["m.weight_packed", "m.weight_scale", "m.weight_shape"]


@pytest.mark.parametrize(
    ("shape", "method", "size", "kind", "reason"),
    [
        ((64, 64), "nf", 64, "linear", "uniform codes, not nf"),
        ((64, 256), "uniform", 256, "linear", "groups of 32, 64 or 128, not 256"),
        ((64, 96), "uniform", 64, "linear", "in_features 96 is not a multiple of 64"),
        ((8, 64), "uniform", 64, "linear", "zero points of 8 rows"),
        ((64, 64), "uniform", 64, "embedding", "not embeddings"),
        ((64, 64), "uniform", 64, "conv1d", "Conv1D"),
    ],
)
def test_what_it_cannot_hold(shape, method, size, kind, reason):
    found = LAYOUT.cannot_hold(Matrix("m.weight", shape, "F32", method, 4, size, kind))
    assert reason in found


def test_a_shape_that_is_not_the_matrix_s_is_an_input_error():
    matrix = Matrix("m.weight", (32, 64), "F32", "uniform", 4, 32)
    tensors = LAYOUT.encode(matrix, drawn(matrix, portable=True))
    tensors["m.weight_shape"] = torch.tensor([64, 32])
    with pytest.raises(CorruptFileError, match=r"m\.weight_shape"):
        LAYOUT.decode(matrix, tensors)


def named(name: str, bits: int, method: str = "uniform") -> Matrix:
    return Matrix(f"{name}.weight", (64, 64), "F32", method, bits, 64)


def test_the_config_of_one_width_targets_every_linear_layer_but_those_that_stay():
    matrices = [named("model.layers.0.self_attn.q_proj", 4)]
    surroundings = Surroundings({}, ["model.embed_tokens", "my_head"], ["model.layers"])
    config = LAYOUT.quantization_config(matrices, surroundings)
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "pack-quantized"
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    expected = {"num_bits": 4, "group_size": 64, "symmetric": False, "type": "int"}
    assert expected.items() <= group["weights"].items()
    assert config["ignore"][:2] == ["model.embed_tokens", "my_head"]
    read = quantization.QuantizationConfig.model_validate(config)
    ignored = compressors_match("lm_head", read.ignore)
    assert ignored
    assert not compressors_match("model.layers.0.self_attn.q_proj", read.ignore)


def compressors_match(name: str, targets: list[str]) -> bool:
    utilities = pytest.importorskip("compressed_tensors.utils")
    return utilities.match_name(name, targets[-1]) or name in targets


def test_widths_become_groups_with_the_names_of_their_layers():
    attention = [named(f"model.layers.0.self_attn.{n}_proj", 4) for n in "qkv"]
    mlp = [named(f"model.layers.0.mlp.{n}_proj", 2) for n in ("gate", "up")]
    surroundings = Surroundings({}, [], ["model.layers"])
    groups = LAYOUT.quantization_config([*attention, *mlp], surroundings)["config_groups"]
    found = {g["weights"]["num_bits"]: g["targets"] for g in groups.values()}
    assert found == {4: [m.module for m in attention], 2: [m.module for m in mlp]}
    assert LAYOUT.cannot_combine([*attention, *mlp]) is None
    assert "several widths" in LAYOUT.remark([*attention, *mlp])
    assert LAYOUT.remark(attention) is None


def test_what_servers_fuse_has_one_width():
    mixed = [named(f"model.layers.0.self_attn.{n}_proj", b) for n, b in zip("qkv", (4, 4, 2))]
    found = LAYOUT.cannot_combine(mixed)
    assert "model.layers.0.self_attn.v_proj.weight 2 bits" in found
    places = ((0, "q", 4), (1, "k", 2))
    apart = [named(f"model.layers.{k}.self_attn.{n}_proj", bits) for k, n, bits in places]
    assert LAYOUT.cannot_combine(apart) is None
