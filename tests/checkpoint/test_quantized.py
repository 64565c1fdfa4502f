"""Checkpoints that are quantized already, by their config or by their tensors; and ones that only
look like it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import loftq_cli
from loftq_cli.checkpoint.locate import locate
from loftq_cli.checkpoint.request import Request
from loftq_cli.checkpoint.source import Source
from loftq_cli.errors import UnsupportedInputError
from tests.support import checkpoints
from tests.support.contents import FAST

BLOCK = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def opened(directory: Path) -> Source:
    return locate(Request(str(directory)), lambda line: None)


def refusal(directory: Path) -> str:
    with pytest.raises(UnsupportedInputError, match="quantized already") as caught:
        opened(directory)
    assert "full-precision" in caught.value.hint
    return caught.value.message


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


CONFIGS: list[tuple[dict[str, Any], str, str]] = [
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config", "(awq)"),
    (
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
        "text_config.quantization_config",
        "(gptq)",
    ),
    (
        {"a": {"llm_config": {"compression_config": {"quant_method": "compressed-tensors"}}}},
        "a.llm_config.compression_config",
        "(compressed-tensors)",
    ),
    ({"parts": [{}, {"quantization_config": {"bits": 4}}]}, "parts[1].quantization_config", ""),
    ({"quantization_config": "fp8"}, "quantization_config", "(fp8)"),
    ({"quantization": {"bits": 4, "group_size": 64}}, "quantization", ""),
]


@pytest.mark.parametrize(("config", "key", "method"), CONFIGS)
def test_a_config_that_says_so_anywhere(tmp_path, config, key, method):
    directory = checkpoints.write(tmp_path / "source", checkpoints.llama(), config)
    message = refusal(directory)
    assert message.startswith(f"{directory / 'config.json'}: {key}: ")
    assert method in message


@pytest.mark.parametrize("empty", [None, {}, []])
def test_an_empty_entry_says_nothing_and_is_not_handed_on(tmp_path, empty):
    config = {
        **checkpoints.LLAMA,
        "quantization_config": empty,
        "text_config": {"compression_config": empty, "quantization_config": empty},
        "quantization": "none",
    }
    directory = checkpoints.write(tmp_path / "source", checkpoints.llama(), config)
    loftq_cli.convert(directory, tmp_path / "out", layout="dense", **FAST)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {**checkpoints.LLAMA, "text_config": {}, "quantization": "none"}


# name: ({tensors}, the tensor that is named, the method)
SIGNS: dict[str, tuple[dict[str, torch.Tensor], str, str]] = {
    "gptq": (
        {
            f"{BLOCK}.qweight": zeros(8, 64, dtype=torch.int32),
            f"{BLOCK}.scales": zeros(1, 64, dtype=torch.float16),
        },
        f"{BLOCK}.qweight",
        "GPTQ",
    ),
    "zero points alone": ({f"{BLOCK}.qzeros": zeros(1, 8, dtype=torch.int32)}, ".qzeros", "AWQ"),
    "compressed-tensors": (
        {
            f"{BLOCK}.weight_packed": zeros(64, 8, dtype=torch.int32),
            f"{BLOCK}.weight_scale": zeros(64, 1, dtype=torch.bfloat16),
        },
        ".weight_packed",
        "compressed-tensors",
    ),
    "int8 with a scale": (
        {
            f"{BLOCK}.weight": zeros(64, 64, dtype=torch.int8),
            f"{BLOCK}.weight_scale": zeros(64, 1),
        },
        ".weight_scale",
        "compressed-tensors",
    ),
    "fp8 cast to 16 bits with its scales": (
        {
            f"{BLOCK}.weight": zeros(64, 64, dtype=torch.bfloat16),
            f"{BLOCK}.weight_scale_inv": zeros(1, 1),
        },
        ".weight_scale_inv",
        "FP8",
    ),
    "experts in codes": (
        {
            EXPERTS: zeros(2, 4, 16, dtype=torch.int8),
            f"{EXPERTS}_scale": zeros(2, 1, 16),
        },
        "_scale",
        "scales beside its codes",
    ),
    "QuIP": (
        {f"{BLOCK}.Qidxs": zeros(64, 8, dtype=torch.int16), f"{BLOCK}.SU": zeros(64)},
        ".Qidxs",
        "QuIP",
    ),
    "EXL2": (
        {f"{BLOCK}.q_weight": zeros(8, 64, dtype=torch.int32), f"{BLOCK}.q_perm": zeros(64)},
        ".q_weight",
        "EXL2",
    ),
    "EXL3": (
        {f"{BLOCK}.trellis": zeros(4, 4, 32, dtype=torch.int16), f"{BLOCK}.suh": zeros(64)},
        ".trellis",
        "EXL3",
    ),
    "integers for weights": (
        {
            f"{BLOCK}.weight": zeros(64, 64, dtype=torch.int8),
            f"{BLOCK}_too.weight": zeros(64, 64, dtype=torch.int8),
        },
        f"{BLOCK}.weight",
        "codes in the place of a weight",
    ),
    "bitsandbytes in 4 bits": (
        {
            f"{BLOCK}.weight": zeros(2048, 1, dtype=torch.uint8),
            f"{BLOCK}.weight.absmax": zeros(64),
        },
        ".weight.absmax",
        "bitsandbytes, 4 bit",
    ),
    "bitsandbytes in 8 bits": (
        {f"{BLOCK}.weight": zeros(64, 64, dtype=torch.int8), f"{BLOCK}.SCB": zeros(64)},
        ".SCB",
        "bitsandbytes, 8 bit",
    ),
    "mlx": (
        {
            f"{BLOCK}.weight": zeros(64, 8, dtype=torch.uint32),
            f"{BLOCK}.scales": zeros(64, 1),
            f"{BLOCK}.biases": zeros(64, 1),
        },
        ".scales",
        "scales beside its codes",
    ),
    "hqq": ({f"{BLOCK}.W_q": zeros(32, 64, dtype=torch.uint8)}, ".W_q", "HQQ"),
    "quanto": (
        {
            f"{BLOCK}.weight._data": zeros(64, 64, dtype=torch.int8),
            f"{BLOCK}.weight._scale": zeros(64, 1),
        },
        ".weight._scale",
        "quanto",
    ),
    "float8": (
        {f"{BLOCK}.weight": zeros(64, 64, dtype=torch.float8_e4m3fn)},
        f"{BLOCK}.weight' is F8_E4M3",
        "",
    ),
}


@pytest.mark.parametrize("name", SIGNS)
@pytest.mark.parametrize("cuts", [(), (3,)])
def test_tensors_give_it_away_where_the_config_is_silent(tmp_path, name, cuts):
    tensors, named, method = SIGNS[name]
    kept = {n: t for n, t in checkpoints.llama().items() if not n.startswith((BLOCK, EXPERTS))}
    directory = checkpoints.write(tmp_path / "source", kept | tensors, cuts=cuts)
    message = refusal(directory)
    assert message.startswith(f"{directory}/model")
    assert ".safetensors: tensor " in message
    assert named in message
    assert method in message


@pytest.mark.parametrize(
    ("layout", "bits", "method"),
    [("bnb", 4, "nf"), ("gptq", 4, "uniform"), ("loftq", 3, "nf"), ("loftq", 2, "uniform")],
)
def test_every_packed_layout_of_ours_is_told_by_its_tensors_alone(tmp_path, layout, bits, method):
    directory = checkpoints.write(tmp_path / "source", checkpoints.llama())
    output = tmp_path / "out"
    loftq_cli.convert(directory, output, layout=layout, bits=bits, method=method, **FAST)
    (output / "loftq_manifest.json").unlink()
    (output / "config.json").write_text(json.dumps(checkpoints.LLAMA))
    refusal(output)


ORDINARY = {
    "logit_scale": zeros(),
    "text.logit_scale": zeros(1),
    "visual.layers.0.layer_scale1.lambda1": zeros(64),
    "visual.layers.0.layer_scale_1.weight": zeros(64),
    "visual.layers.0.ls1.gamma": zeros(64),
    "model.layers.0.norm.weight": zeros(64),
    "model.layers.0.norm.weight_scale": zeros(1),  # of a vector
    "model.layers.0.other.weight_scale": zeros(64, 1),  # of no weight at all
    "model.layers.0.act.scales": zeros(64),
    "model.layers.0.conv.weight": zeros(4, 4, 3),
    "model.layers.0.conv.scale": zeros(4),
    "model.layers.0.rope.qweight": zeros(64),
    "model.layers.0.position_ids": zeros(64, dtype=torch.int64),
    "model.transformer_blocks": zeros(3),
    "model.transformer_scales": zeros(3),
}


def test_tensors_with_such_names_in_ordinary_checkpoints_are_no_sign(tmp_path):
    directory = checkpoints.write(tmp_path / "source", checkpoints.llama() | ORDINARY)
    assert len(opened(directory).tensors) == len(checkpoints.llama()) + len(ORDINARY)


def test_nothing_is_written_and_calibrating_and_reporting_refuse_it_too(tmp_path):
    tensors, _, _ = SIGNS["gptq"]
    directory = checkpoints.write(tmp_path / "source", checkpoints.llama() | tensors)
    with pytest.raises(UnsupportedInputError, match="quantized already"):
        loftq_cli.convert(directory, tmp_path / "out", **FAST)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
    good = checkpoints.write(tmp_path / "good", checkpoints.llama())
    loftq_cli.convert(good, tmp_path / "out", **FAST)
    with pytest.raises(UnsupportedInputError, match="quantized already"):
        loftq_cli.error_report(tmp_path / "out", directory)
