"""Sources that are quantized themselves: decoded to the values that transformers, or the library of
the format, computes with; converted as their dequantized copies are; and refused with a reason."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import loftq_cli
from loftq_cli.checkpoint.encoded import EncodedTensor
from loftq_cli.checkpoint.locate import locate
from loftq_cli.checkpoint.reader import ShardReader
from loftq_cli.checkpoint.request import Request
from loftq_cli.checkpoint.source import Source
from loftq_cli.conversion.prepare import prepare
from loftq_cli.conversion.run import run
from loftq_cli.errors import CorruptFileError, InputError, UnsupportedInputError
from loftq_cli.settings.options import Options
from tests.support import checkpoints, decoded_by_gptqmodel, encoded
from tests.support.bench import Recorder
from tests.support.quantizing import gaussian

Tensors = dict[str, torch.Tensor]
QUERY = "model.layers.0.self_attn.q_proj.weight"
SETTINGS: dict[str, Any] = {"bits": 2, "rank": 4, "iters": 1, "threads": 1, "layout": "loftq"}


def small() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.fixture(scope="module")
def model() -> Any:
    return small()


def write(place: Path, model: Any, tensors: Tensors, stated: Any, cuts: Any = ()) -> Path:
    config = {**json.loads(model.config.to_json_string()), "architectures": ["LlamaForCausalLM"]}
    return checkpoints.write(place, tensors, {**config, "quantization_config": stated}, cuts=cuts)


def opened(directory: Path) -> Source:
    return locate(Request(str(directory)), lambda line: None)


def read(directory: Path) -> Tensors:
    """Every tensor of the source, which is hashed as a whole on the way."""
    values = {}
    for shard in opened(directory).shards:
        with ShardReader(shard) as reader:
            for tensor in shard.header.tensors:
                values[tensor.name] = reader.read(tensor).clone()
            reader.finish()
            assert reader.sha256 == hashlib.sha256(shard.path.read_bytes()).hexdigest()
    return values


def stored(output: Path) -> Tensors:
    """Every tensor of an output, the adapter's included."""
    found: Tensors = {}
    for file in sorted(output.rglob("*.safetensors")):
        found |= load_file(file)
    return found


Make = Callable[[Tensors], tuple[Tensors, Any]]
FORMS: dict[str, Make] = {
    "FP8, blocks": encoded.fp8_blocks,
    "FP8, small blocks": lambda tensors: encoded.fp8_blocks(tensors, (64, 32)),
    "FP8, rows": lambda tensors: encoded.fp8_rows(tensors, True, torch.bfloat16),
    "FP8, rows, float32": lambda tensors: encoded.fp8_rows(tensors, True, torch.float32),
    "FP8, a tensor": lambda tensors: encoded.fp8_rows(tensors, False, torch.float32),
    "int4": lambda tensors: encoded.int4(tensors, 64, True),
    "int4, zero points": lambda tensors: encoded.int4(tensors, 32, False),
}


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("form", FORMS)
def test_values_are_those_that_transformers_decodes(form: str, model: Any, tmp_path: Path) -> None:
    tensors, stated = FORMS[form](dict(model.state_dict()))
    directory = write(tmp_path / "source", model, tensors, stated, cuts=(9, 20))
    options: dict[str, Any] = {}
    if stated["quant_method"] == "compressed-tensors":
        entry = transformers.CompressedTensorsConfig(dequantize=True)
        options = {"quantization_config": entry}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, **options
    )
    expected, found = loaded.state_dict(), read(directory)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not torch.equal(found[QUERY], model.state_dict()[QUERY])


@pytest.mark.parametrize("cuts", [(), (4,), (9, 10)])
def test_it_converts_as_what_it_means_does(model: Any, tmp_path: Path, cuts: Any) -> None:
    """Also if scales are in other shards than their codes; and what is not selected is decoded."""
    tensors, stated = encoded.fp8_blocks(dict(model.state_dict()))
    source = write(tmp_path / "source", model, tensors, stated, cuts=cuts)
    plain = checkpoints.write(
        tmp_path / "plain",
        read(source),
        {**json.loads((source / "config.json").read_text()), "quantization_config": None},
    )
    settings = {**SETTINGS, "exclude": ["*.1.mlp.*"]}
    said = loftq_cli.convert(source, tmp_path / "ours", **settings)
    loftq_cli.convert(plain, tmp_path / "theirs", **settings)
    ours, theirs = (stored(tmp_path / name) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "loftq"
    assert said["source"]["encoded"] == ["FP8"]
    loftq_cli.error_report(tmp_path / "ours", source)
    loftq_cli.convert(source, tmp_path / "target", **{**settings, "target_bpw": 3.0, "bits": None})


def test_an_unfinished_conversion_of_it_is_gone_on_with(model: Any, tmp_path: Path) -> None:
    tensors, stated = encoded.fp8_blocks(dict(model.state_dict()))
    source = write(tmp_path / "source", model, tensors, stated, cuts=(7,))
    whole = loftq_cli.convert(source, tmp_path / "whole", **SETTINGS)

    class Stopped(Recorder):
        def working_on(self, tensor: str) -> None:
            if "layers.1.mlp.up" in tensor:
                raise KeyboardInterrupt

    for observer in (Stopped(), Recorder()):
        plan, path = prepare(
            Request(str(source)), tmp_path / "out", Options(**SETTINGS), observer=observer
        )
        if isinstance(observer, Stopped):
            with pytest.raises(KeyboardInterrupt):
                run(plan, path, overwrite=False, observer=observer)
        else:
            run(plan, path, overwrite=False, observer=observer)
    ours, theirs = (stored(tmp_path / name) for name in ("out", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (
        whole["matrices"]
        == json.loads((tmp_path / "out/loftq_manifest.json").read_text())["matrices"]
    )


@pytest.mark.parametrize("shape", [(320, 200), (576, 128), (100, 130)])
def test_blocks_that_do_not_divide_a_matrix_are_cut_off(
    shape: tuple[int, int], tmp_path: Path
) -> None:
    """DeepSeek-V3 has a matrix of 576 rows; transformers 5.23 refuses such."""
    weight = gaussian(*shape, seed=1)
    codes, scales = encoded.fp8(weight, (128, 128))
    parts = {QUERY: codes, f"{QUERY}_scale_inv": scales}
    directory = checkpoints.write(tmp_path / "source", {**checkpoints.llama(), **parts})
    rows, columns = (torch.arange(size) // 128 for size in shape)
    expected = codes.double() * scales.double()[rows][:, columns]
    assert torch.equal(read(directory)[QUERY], expected.float().bfloat16())


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 140, (3, 8, 2), dtype=torch.uint8, generator=generator)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    parts = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    tensors = {**checkpoints.llama(), **parts}
    directory = checkpoints.write(tmp_path / "source", tensors)
    expected = convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(read(directory)[name], expected)
    assert opened(directory).encoded == ("MXFP4",)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bitsandbytes_in_4_bits(
    kind: str, dtype: torch.dtype, nested: bool, tmp_path: Path
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = gaussian(96, 320, seed=1).to(dtype)
    codes, state = functional.quantize_4bit(
        weight, quant_type=kind, compress_statistics=nested, blocksize=64
    )
    parts = {QUERY: codes}
    parts |= {f"{QUERY}.{key}": value for key, value in state.as_dict(packed=True).items()}
    directory = checkpoints.write(tmp_path / "source", {**checkpoints.llama(), **parts})
    found = read(directory)[QUERY]
    assert found.dtype == dtype
    assert torch.equal(found, functional.dequantize_4bit(codes, state))


@pytest.mark.gptq
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_in_any_order_of_columns(bits: int, form: str, tmp_path: Path) -> None:
    rows, columns, size = 64, 128, 32
    generator = torch.Generator().manual_seed(0)

    def words(*shape: int) -> torch.Tensor:
        drawn = torch.randint(-(2**31), 2**31 - 1, shape, generator=generator)
        return drawn.to(torch.int32)

    parts = {
        "qweight": words(columns * bits // 32, rows),
        "qzeros": words(columns // size, rows * bits // 32) & 0x77777777,
        "scales": gaussian(columns // size, rows, seed=1).half(),
        "g_idx": (torch.randperm(columns, generator=generator) // size).int(),
    }
    module = QUERY.removesuffix(".weight")
    tensors = {name: t for name, t in checkpoints.llama().items() if name != QUERY}
    tensors |= {f"{module}.{key}": value for key, value in parts.items()}
    stated = {"quant_method": "gptq", "bits": bits, "checkpoint_format": form}
    config = {**checkpoints.LLAMA, "dtype": "float16", "quantization_config": stated}
    directory = checkpoints.write(tmp_path / "source", tensors, config)
    expected = decoded_by_gptqmodel.gptq(parts, bits, form)
    assert torch.equal(read(directory)[QUERY], expected)


@pytest.mark.gptq
def test_awq(tmp_path: Path) -> None:
    parts, expected = decoded_by_gptqmodel.awq()
    module = QUERY.removesuffix(".weight")
    tensors = {name: t for name, t in checkpoints.llama().items() if name != QUERY}
    tensors |= {f"{module}.{key}": value for key, value in parts.items()}
    stated = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}
    config = {**checkpoints.LLAMA, "dtype": "float16", "quantization_config": stated}
    directory = checkpoints.write(tmp_path / "source", tensors, config)
    assert torch.equal(read(directory)[QUERY], expected)


def broken_fp8(change: Callable[[Tensors], None], tmp_path: Path) -> Path:
    tensors, stated = encoded.fp8_blocks(checkpoints.llama(hidden=128, intermediate=256))
    change(tensors)
    config = {**checkpoints.LLAMA, "quantization_config": stated}
    return checkpoints.write(tmp_path / "source", tensors, config)


def put(value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{QUERY}_scale_inv"][0, 0] = value

    return change


def without(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def shaped(*shape: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{QUERY}_scale_inv"] = torch.ones(shape)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(float("nan")), r"its scale at \[0, 0\] is not finite"),
        (put(float("inf")), r"its scale at \[0, 0\] is not finite"),
        (put(0.0), r"its scale at \[0, 0\] is zero"),
        (without(f"{QUERY}_scale_inv"), "there is no scale for it"),
        (shaped(3, 5), r"with scales \[3, 5\], which are no blocks of it"),
        (shaped(2), r"with scales \[2\], which are no blocks of it"),
    ],
)
def test_scales_that_are_wrong(change: Any, words: str, tmp_path: Path) -> None:
    source = broken_fp8(change, tmp_path)
    with pytest.raises(CorruptFileError, match=words) as caught:
        loftq_cli.convert(source, tmp_path / "out", **SETTINGS)
    assert QUERY in caught.value.message
    assert not (tmp_path / "out").exists()


def test_fp8_of_more_dimensions_is_refused_by_name(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {**checkpoints.llama(), name: torch.ones(2, 4, 4).to(torch.float8_e4m3fn)}
    directory = checkpoints.write(tmp_path / "source", tensors)
    with pytest.raises(UnsupportedInputError, match=r"experts\.gate_up_proj"):
        opened(directory)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"absmax": None}, "absmax or quant_map is missing"),
        ({"quant_state": b"{}"}, "its quant_state is damaged"),
        ({"quant_state": b'{"shape": [4, 4], "blocksize": 64, "dtype": "float16"}'}, "bytes of"),
    ],
)
def test_parts_of_bitsandbytes_that_do_not_fit(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(gaussian(64, 64).half(), quant_type="nf4")
    parts = {QUERY: codes}
    for key, value in state.as_dict(packed=True).items():
        parts[f"{QUERY}.{key}"] = value
    if "absmax" in change:
        del parts[f"{QUERY}.absmax"]
    else:
        raw = torch.frombuffer(bytearray(change["quant_state"]), dtype=torch.uint8)
        parts[f"{QUERY}.quant_state.bitsandbytes__nf4"] = raw
    directory = checkpoints.write(tmp_path / "source", {**checkpoints.llama(), **parts})
    with pytest.raises(InputError, match=words):
        opened(directory)


def test_a_shape_that_the_file_states_otherwise(model: Any, tmp_path: Path) -> None:
    tensors, stated = encoded.int4(dict(model.state_dict()), 64, True)
    tensors[f"{QUERY}_shape"] = torch.tensor([256, 255])
    source = write(tmp_path / "source", model, tensors, stated)
    with pytest.raises(CorruptFileError, match=r"weight_shape is \[256, 255\], not \[256, 256\]"):
        loftq_cli.convert(source, tmp_path / "out", **SETTINGS)


def test_what_is_encoded_says_what_it_is_made_of(model: Any, tmp_path: Path) -> None:
    tensors, stated = encoded.fp8_blocks(dict(model.state_dict()))
    source = opened(write(tmp_path / "source", model, tensors, stated))
    found = next(t for t in source.tensors if t.name == QUERY)
    assert isinstance(found, EncodedTensor)
    assert (found.dtype, found.shape) == ("BF16", (256, 256))
    assert {part.tensor.name for part in found.others.values()} == {f"{QUERY}_scale_inv"}
    assert "quantization_config" not in source.config.content


def test_scales_of_activations_are_no_part_of_the_model(model: Any, tmp_path: Path) -> None:
    tensors, stated = encoded.fp8_blocks(dict(model.state_dict()))
    tensors[QUERY.replace("weight", "input_scale")] = torch.ones(1)
    source = write(tmp_path / "source", model, tensors, stated)
    assert read(source).keys() == model.state_dict().keys()
