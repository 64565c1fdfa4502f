"""The transformers quantizer: what it accepts, which modules it replaces, what it saves."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from loftq_cli.errors import CorruptFileError, UnsupportedInputError
from loftq_cli.loading.linear import PackedLinear
from loftq_cli.loading.quantizer import LoftqConfig
from loftq_cli.loading.warned import DetachedAdapter

ENTRY = {"bits": 3, "block_size": 64, "decoding": "codebook"}
CONFIG = {"quant_method": "loftq", "format_version": 1, "modules": {"a.b": ENTRY}}


def entry(**changes):
    return {"modules": {"a.b": {**ENTRY, **changes}}}


def packed(model) -> dict[str, PackedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}


@pytest.mark.parametrize(
    "changes",
    [{}, entry(scales="bfloat16"), entry(scales="int8"), entry(decoding="trellis", bits=2)],
)
def test_config_round_trips(changes) -> None:
    config = {**CONFIG, **changes}
    assert LoftqConfig.from_dict(config).to_dict() == config


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"format_version": 2}, UnsupportedInputError, "format_version 2.*upgrade loftq-cli"),
        ({"format_version": "1"}, CorruptFileError, "format_version '1'"),
        ({"format_version": True}, CorruptFileError, "format_version True"),
        ({"format_version": None}, CorruptFileError, "format_version None"),
        ({"surprise": 1}, UnsupportedInputError, "unknown keys surprise.*upgrade loftq-cli"),
        ({"modules": {}}, CorruptFileError, "no modules"),
        ({"modules": ["a.b"]}, CorruptFileError, "no modules"),
        ({"modules": {"a.b": 3}}, CorruptFileError, "'a.b': expected bits"),
        ({"modules": {"a.b": {"bits": 3}}}, CorruptFileError, "'a.b': expected bits"),
        (entry(surprise=1), UnsupportedInputError, "'a.b': unknown keys surprise"),
        (entry(decoding="lattice"), UnsupportedInputError, "'a.b': decoding 'lattice'"),
        (entry(decoding="trellis"), CorruptFileError, "'a.b': bits 3"),
        (entry(decoding="trellis", bits=2, block_size=0), CorruptFileError, "'a.b': block_size 0"),
        (entry(scales="float8"), UnsupportedInputError, "'a.b': scales 'float8'"),
        (entry(scales="float32"), UnsupportedInputError, "'a.b': scales 'float32'"),
        (entry(scales=None), UnsupportedInputError, "'a.b': scales None"),
        (entry(bits=5), CorruptFileError, "'a.b': bits 5"),
        (entry(bits=2.0), CorruptFileError, "'a.b': bits 2.0"),
        (entry(block_size=63), CorruptFileError, "'a.b': block_size 63"),
        (entry(decoding="affine", block_size=0), CorruptFileError, "'a.b': block_size 0"),
    ],
)
def test_config_refuses_what_it_does_not_know(changes, error, named) -> None:
    with pytest.raises(error, match=named):
        LoftqConfig.from_dict({**CONFIG, **changes})


def test_loading_refuses_a_newer_format(converted, tmp_path) -> None:
    directory = _edited(converted("llama"), tmp_path, format_version=2)
    with pytest.raises(UnsupportedInputError, match="upgrade loftq-cli"):
        transformers.AutoModelForCausalLM.from_pretrained(directory)


def test_loading_refuses_a_full_precision_checkpoint(tmp_path, converted) -> None:
    source = converted("llama").parent / "source"
    with pytest.raises(ValueError, match="pre-quantized"):
        transformers.AutoModelForCausalLM.from_pretrained(
            source, quantization_config=LoftqConfig.from_dict(CONFIG)
        )


@pytest.mark.parametrize(
    ("kind", "model_class", "prefix"),
    [
        ("bert", transformers.BertModel, ("", "")),
        ("bert", transformers.AutoModelForSequenceClassification, ("", "bert.")),
        ("classifier", transformers.AutoModelForSequenceClassification, ("bert.", "bert.")),
        ("classifier", transformers.BertModel, ("bert.", "")),
        ("llama", transformers.AutoModelForCausalLM, ("model.", "model.")),
        ("llama", transformers.AutoModel, ("model.", "")),
    ],
)
def test_modules_are_found_with_and_without_the_base_prefix(
    converted, kind, model_class, prefix
) -> None:
    directory = converted(kind)
    stored, loaded = prefix
    # PEFT finds no target in a model whose names are shorter than the adapter's.
    shorter = len(loaded) < len(stored)
    expected = pytest.warns(DetachedAdapter, match=r"use loftq_cli\.load")
    with expected if shorter else nullcontext():
        model, info = model_class.from_pretrained(directory, output_loading_info=True)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert {stored + name.removeprefix(loaded) for name in packed(model)} == set(config["modules"])
    tensors = load_file(directory / "model.safetensors")
    for name, module in packed(model).items():
        key = stored + name.removeprefix(loaded)
        assert torch.equal(module.weight, tensors[f"{key}.weight"])
        assert torch.equal(module.weight_scales, tensors[f"{key}.weight_scales"])
    heads = {"classifier.weight", "classifier.bias"} if stored != loaded and loaded else set()
    assert set(info["missing_keys"]) == heads


def test_a_module_that_the_model_lacks_is_named(converted, tmp_path) -> None:
    directory = _edited(converted("llama"), tmp_path, modules={"model.layers.7.mlp.up_proj": ENTRY})
    with pytest.raises(UnsupportedInputError, match=r"no linear layer model\.layers\.7\.mlp"):
        transformers.AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize(
    "suffix", ["weight", "weight_scales", "weight_scale_steps", "weight_levels"]
)
def test_a_missing_tensor_is_an_error(converted, tmp_path, suffix) -> None:
    settings = {"scale_dtype": "int8"} if suffix == "weight_scale_steps" else {}
    directory = shutil.copytree(converted("llama", **settings), tmp_path / "out")
    tensors = load_file(directory / "model.safetensors")
    name = f"model.layers.1.self_attn.q_proj.{suffix}"
    del tensors[name]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptFileError, match=f"lacks {name}"):
        transformers.AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("method", ["nf", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scales", ["float32", "bfloat16", "int8"])
def test_scales_stay_as_stored_in_any_dtype(converted, method, scales, dtype) -> None:
    directory = converted("llama", method=method, scale_dtype=scales)
    tensors = load_file(directory / "model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    assert model.dtype == model.lm_head.weight.dtype == dtype
    for moved in (model, model.to(torch.bfloat16), model.to(torch.float16)):
        for name, module in packed(moved).items():
            for key, tensor in module.state_dict().items():
                assert torch.equal(tensor, tensors[f"{name}.{key}"])
                assert tensor.dtype == tensors[f"{name}.{key}"].dtype


@pytest.mark.parametrize(
    ("kind", "scales"), [("llama", "float32"), ("bert", "float32"), ("llama", "int8")]
)
def test_saved_model_loads_again(converted, tmp_path, kind, scales) -> None:
    task = {"llama": "AutoModelForCausalLM", "bert": "AutoModelForSequenceClassification"}[kind]
    model_class = getattr(transformers, task)
    model = model_class.from_pretrained(converted(kind, scale_dtype=scales))
    model.save_pretrained(tmp_path)
    again, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert packed(again).keys() == packed(model).keys()
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert LoftqConfig.from_dict(saved).to_dict() == saved


@pytest.mark.filterwarnings("ignore::loftq_cli.loading.warned.DetachedAdapter")
def test_part_of_the_model_may_be_offloaded_to_disk(converted, tmp_path) -> None:
    directory = converted("llama")
    plain = transformers.AutoModelForCausalLM.from_pretrained(directory)
    on_cpu = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    devices = {**dict.fromkeys(on_cpu, "cpu"), "model.layers.1": "disk"}
    offloaded = transformers.AutoModelForCausalLM.from_pretrained(
        directory, device_map=devices, offload_folder=tmp_path
    )
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(offloaded(tokens).logits, plain(tokens).logits)


def _edited(directory, tmp_path, **changes):
    """A copy of ``directory`` whose quantization_config has ``changes``."""
    copy = shutil.copytree(directory, tmp_path / "out")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] |= changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_a_family_may_ask_for_the_shapes_of_what_it_would_draw(converted, monkeypatch) -> None:
    """As Blt's initialisation does, of layers that are packed and so have no shape of theirs."""
    asked = []
    original = transformers.LlamaPreTrainedModel._init_weights

    def ask(self, module) -> None:
        if type(module).__name__ == "LlamaMLP":
            asked.append(module.down_proj.weight.shape[1])
        original(self, module)

    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_init_weights", ask)
    model = transformers.AutoModelForCausalLM.from_pretrained(converted("llama"))
    assert packed(model)
    assert not asked
