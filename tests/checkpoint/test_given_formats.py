"""Checkpoints that the libraries themselves wrote: every matrix is read as what they decode it to,
bit for bit, in a source and alone."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loftq_cli
from loftq_cli.checkpoint.decoding.find import decoded_alone
from loftq_cli.checkpoint.encoded import EncodedTensor
from loftq_cli.checkpoint.locate import locate
from loftq_cli.checkpoint.packing import pack
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.checkpoint.request import Request
from tests.support import checkpoints, decoded_by_gptqmodel, given
from tests.support.quantizing import gaussian

Tensors = dict[str, torch.Tensor]
NAME = "model.layers.0.self_attn.q_proj.weight"
MODULE = NAME.removesuffix(".weight")


def read(directory: Path) -> torch.Tensor:
    """The matrix NAME, decoded while it is read and, which must be the same, alone."""
    source = locate(Request(str(directory)), lambda line: None)
    for shard in source.shards:
        for tensor in shard.header.tensors:
            if tensor.name == NAME:
                assert isinstance(tensor, EncodedTensor)
                with TensorFile(shard.path) as file:
                    found = file.read(tensor)
                stored = load_file(directory / shard.name)
                parts = {name: stored[name] for name in tensor.names}
                assert torch.equal(decoded_alone(parts, tensor.stated, tensor.dtype), found)
                return found
    raise AssertionError(NAME)


def written(place: Path, parts: Tensors, stated: Any, dtype: str = "float16") -> Path:
    """A Llama whose matrix NAME is in ``parts``."""
    tensors = {name: t for name, t in checkpoints.llama().items() if name != NAME}
    config = {**checkpoints.LLAMA, "dtype": dtype, "quantization_config": stated}
    return checkpoints.write(place, {**tensors, **parts}, config)


def quantized_linear(bits: int, form: str, columns: int = 128, rows: int = 64) -> Any:
    """The stored tensors of gptqmodel's own layer, codes and order drawn, and what it decodes."""
    size, generator = 32, torch.Generator().manual_seed(bits)

    def packed(*shape: int) -> torch.Tensor:
        """Codes below the largest, so that zero points less one do not carry."""
        codes = torch.randint(0, 2**bits - 1, shape, generator=generator).to(torch.uint8)
        return pack(codes, bits).view(torch.int32).view(shape[0], -1)

    parts = {
        "qweight": packed(rows, columns).T.contiguous(),
        "qzeros": packed(columns // size, rows),
        "scales": gaussian(columns // size, rows, seed=1).half(),
        "g_idx": (torch.randperm(columns, generator=generator) // size).int(),
    }
    expected = decoded_by_gptqmodel.gptq(parts, bits, form)
    return {f"{MODULE}.{key}": value for key, value in parts.items()}, expected


@pytest.mark.gptq
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodel_s(bits: int, form: str, tmp_path: Path) -> None:
    parts, expected = quantized_linear(bits, form)
    stated = {"quant_method": "gptq", "bits": bits, "checkpoint_format": form, "desc_act": True}
    assert torch.equal(read(written(tmp_path / "m", parts, stated)), expected)


@pytest.mark.gptq
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize(
    ("packing", "form"),
    [
        ("auto_round:auto_gptq", "gptq"),
        ("auto_round:gptqmodel", "gptq_v2"),
        ("auto_round", "gptq_v2"),
    ],
)
@pytest.mark.parametrize("bits", [2, 4])
def test_autoround_s_packings_are_gptq_s(
    bits: int, packing: str, form: str, tmp_path: Path
) -> None:
    """As its backends say (zero points less one, or as they are): not its own export."""
    parts, expected = quantized_linear(bits, form)
    stated = {"quant_method": "auto-round", "bits": bits, "packing_format": packing}
    assert torch.equal(read(written(tmp_path / "m", parts, stated)), expected)


@pytest.mark.gptq
def test_awq_that_gptqmodel_packed(tmp_path: Path) -> None:
    parts, expected = decoded_by_gptqmodel.awq()
    named = {f"{MODULE}.{key}": value for key, value in parts.items()}
    for stated in (
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"},
        {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_awq"},
    ):
        directory = written(tmp_path / str(stated["quant_method"]), named, stated)
        assert torch.equal(read(directory), expected)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_in_4_bits(kind: str, nested: bool, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = gaussian(96, 320, seed=1).half()
    codes, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    parts = {NAME: codes, **{f"{NAME}.{k}": v for k, v in state.as_dict(packed=True).items()}}
    stated = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    found = read(written(tmp_path / "m", parts, stated))
    assert torch.equal(found, functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_bitsandbytes_in_8_bits(dtype: str, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, largest, _ = functional.int8_vectorwise_quant(gaussian(96, 320, seed=1).half())
    parts = {NAME: codes, f"{MODULE}.SCB": largest}
    parts[f"{MODULE}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    stated = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    found = read(written(tmp_path / "m", parts, stated, dtype))
    expected = functional.int8_vectorwise_dequant(codes, largest)
    assert torch.equal(found, expected.to(getattr(torch, dtype)))


WEIGHTS: dict[str, dict[str, Any]] = {
    "2 bits": {"num_bits": 2, "strategy": "group", "group_size": 32, "symmetric": True},
    "3 bits, zero points": {"num_bits": 3, "strategy": "group", "group_size": 32},
    "4 bits": {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": True},
    "8 bits, rows": {"num_bits": 8, "strategy": "channel", "symmetric": True},
    "int8, rows": {"num_bits": 8, "strategy": "channel", "symmetric": True},
    "int8, a tensor": {"num_bits": 8, "strategy": "tensor", "symmetric": True},
    "int8, zero points": {"num_bits": 8, "strategy": "channel"},
}


@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_compressed_tensors(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Compressed and decompressed by that library."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = importlib.import_module("compressed_tensors.compressors")
    kind = "int-quantized" if "int8" in form else "pack-quantized"
    weights = {"type": "int", "symmetric": False, "dynamic": False, **WEIGHTS[form]}
    args = quantization.QuantizationArgs(**weights)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    compressor = compressors.BaseCompressor.get_value_from_registry(kind)
    weight = gaussian(64, 128, seed=3).to(dtype)
    size = {"group": weights.get("group_size"), "channel": 128, "tensor": weight.numel()}
    groups = weight.float().reshape(-1, size[weights["strategy"]])
    half = 2 ** (weights["num_bits"] - 1)
    state = {"weight": weight}
    shape = (1,) if weights["strategy"] == "tensor" else (64, -1)
    if weights["symmetric"]:
        scales = groups.abs().amax(dim=1) / half
    else:
        low, high = groups.amin(dim=1), groups.amax(dim=1)
        scales = (high - low) / (2 * half - 1)
        zeros = (-half - low / scales).round().clamp(-half, half - 1)
        state["weight_zero_point"] = zeros.to(torch.int8).reshape(shape)
    state["weight_scale"] = scales.to(dtype).reshape(shape)
    parts = compressor.compress(dict(state), scheme)
    expected = compressor.decompress(dict(parts), scheme)["weight"]
    named = {f"{MODULE}.{key}": value for key, value in parts.items()}
    stated = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    name = str(dtype).removeprefix("torch.")
    assert torch.equal(read(written(tmp_path / "m", named, stated, name)), expected)


def test_rows_of_a_width_that_fills_no_word(tmp_path: Path) -> None:
    """3 bits of 80 columns: 7.5 words a row, of which the file says how much is codes."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = importlib.import_module("compressed_tensors.compressors")
    weights = {"num_bits": 3, "type": "int", "symmetric": True, "strategy": "channel"}
    args = quantization.QuantizationArgs(**weights)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    weight = gaussian(64, 80, seed=3)
    state = {"weight": weight, "weight_scale": weight.abs().amax(dim=1, keepdim=True) / 4}
    parts = compressor.compress(dict(state), scheme)
    expected = compressor.decompress(dict(parts), scheme)["weight"]
    named = {f"{MODULE}.{key}": value for key, value in parts.items()}
    stated = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    assert torch.equal(read(written(tmp_path / "m", named, stated, "float32")), expected)


@pytest.mark.parametrize("missing", ["qzeros", "scales"])
def test_a_part_that_is_missing(missing: str, tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "source", checkpoints.llama())
    backbone = given.quantized(source, tmp_path / "theirs", "gptq")
    tensors = load_file(backbone / "model.safetensors")
    del tensors[f"{MODULE}.{missing}"]
    broken = given.of(backbone, tmp_path / "broken", tensors, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(loftq_cli.errors.CorruptFileError, match=f"{missing} is missing"):
        loftq_cli.adapt(broken, tmp_path / "out", source=source)


def test_int8_without_its_scales_is_no_weight(tmp_path: Path) -> None:
    tensors, stated = given.int8(checkpoints.llama())
    del tensors[f"{MODULE}.SCB"]
    source = checkpoints.write(tmp_path / "source", checkpoints.llama())
    backbone = given.of(source, tmp_path / "theirs", tensors, stated)
    with pytest.raises(loftq_cli.errors.InputError, match="is I8 in the backbone, without what"):
        loftq_cli.adapt(backbone, tmp_path / "out", source=source)
