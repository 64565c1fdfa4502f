"""``inspect``: the sums are right, and the code it shows runs."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import loftq_cli
from loftq_cli.checkpoint.output import open_output
from loftq_cli.checkpoint.small_file import read_json
from loftq_cli.families.classes import auto_class
from loftq_cli.reporting.inspect import snippet
from tests.reporting.conftest import CASES

every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_every_layer_and_the_totals(case, converted):
    output = converted(case)
    found = loftq_cli.inspect(output)
    manifest = json.loads((output / "loftq_manifest.json").read_text())
    backbone: dict[str, torch.Tensor] = {}
    for path in output.glob("*.safetensors"):
        backbone |= load_file(path)
    adapter = load_file(output / "loftq_init" / "adapter_model.safetensors")
    assert [layer["name"] for layer in found["layers"]] == [
        record["name"] for record in manifest["matrices"]
    ]
    for layer in found["layers"]:
        module = layer["name"].removesuffix(".weight")
        weights = layer["shape"][0] * layer["shape"][1]
        held = sum(t.nbytes for name, t in backbone.items() if name.startswith(f"{module}."))
        added = sum(t.nbytes for name, t in adapter.items() if f".{module}." in name)
        assert layer["backbone_bytes"] == held
        assert layer["adapter_bytes"] == added
        assert layer["source_bytes"] == weights * {"F32": 4, "BF16": 2}[layer["dtype"]]
        assert layer["bits_per_weight"] == pytest.approx(held * 8 / weights)
        assert layer["bits_per_weight_with_adapter"] == pytest.approx((held + added) * 8 / weights)
    totals = found["totals"]
    elements = sum(layer["shape"][0] * layer["shape"][1] for layer in found["layers"])
    stored = sum(layer["backbone_bytes"] + layer["adapter_bytes"] for layer in found["layers"])
    assert totals["bits_per_weight_with_adapter"] == pytest.approx(stored * 8 / elements)
    files = [path for path in output.rglob("*") if path.is_file() and "manifest" not in path.name]
    assert totals["output_bytes"] == sum(path.stat().st_size for path in files)
    assert {name: totals[name] for name in manifest["totals"]} == manifest["totals"]
    assert found["passed_through"] == len(manifest["passed_through"])
    assert found["verified_files"] is None
    assert found["source"].keys() == {"id", "revision"}


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        (["LlamaForCausalLM"], "AutoModelForCausalLM"),
        (["GPT2LMHeadModel"], "AutoModelForCausalLM"),
        (["BartForConditionalGeneration"], "AutoModelForSeq2SeqLM"),
        (["WhisperForConditionalGeneration"], "WhisperForConditionalGeneration"),
        (["LlavaForConditionalGeneration"], "LlavaForConditionalGeneration"),
        (["import os; ForConditionalGeneration"], "AutoModel"),
        (["BertForSequenceClassification"], "AutoModelForSequenceClassification"),
        (["BertForTokenClassification"], "AutoModelForTokenClassification"),
        (["BertForQuestionAnswering"], "AutoModelForQuestionAnswering"),
        (["BertForMaskedLM"], "AutoModelForMaskedLM"),
        (["BertModel"], "AutoModel"),
        ([], "AutoModel"),
        ([7], "AutoModel"),
        (None, "AutoModel"),
        ("LlamaForCausalLM", "AutoModel"),
    ],
)
def test_the_class_to_load_with(output, architectures, expected):
    (output / "config.json").write_text(json.dumps({"architectures": architectures}))
    assert auto_class(read_json(output / "config.json").content) == expected
    assert hasattr(transformers, expected)


@pytest.mark.parametrize("content", [None, b"", b"[]", b"\xff"])
def test_an_unreadable_config_has_no_class(output, content):
    (output / "config.json").unlink()
    if content is not None:
        (output / "config.json").write_bytes(content)
    assert "AutoModel.from_pretrained" in snippet(open_output(output))


def test_a_pipe_for_a_config_is_not_waited_for(output):
    (output / "config.json").unlink()
    os.mkfifo(output / "config.json")
    assert "AutoModel.from_pretrained" in snippet(open_output(output))


@every_case
def test_only_layout_loftq_needs_our_import(case, converted):
    code = snippet(open_output(converted(case)))
    layout = loftq_cli.inspect(converted(case))["layers"][0]["layout"]
    assert code.startswith("import loftq_cli\n") == (layout == "loftq")
    compile(code, "snippet", "exec")


@pytest.mark.parametrize("settings", [{"layout": "dense"}, {"layout": "loftq", "bits": 2}])
def test_the_code_it_shows_runs(tmp_path, settings):
    from tests.support import models

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, while it saves and loads
        directory = models.save(models.llama(), tmp_path / "it's")
        output = tmp_path / 'a "model"'
        loftq_cli.convert(directory, output, rank=4, iters=1, threads=1, **settings)
        names: dict[str, Any] = {}
        exec(loftq_cli.inspect(output)["loading"], names)
    model = names["model"]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_a_path_or_a_string(output):
    assert loftq_cli.inspect(str(output)) == loftq_cli.inspect(Path(output))


@pytest.mark.parametrize(
    ("kind", "name", "shown"),
    [
        ("llama", "LlamaForCausalLM", "AutoModelForCausalLM"),
        ("gpt2", "GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("gpt2", "GPT2DoubleHeadsModel", "GPT2DoubleHeadsModel"),
        ("xlm-roberta", "XLMRobertaModel", "AutoModel"),
        ("deberta-v2", "DebertaV2Model", "AutoModel"),
        ("clip_vision_model", "CLIPVisionModel", "AutoModel"),
        ("t5", "T5EncoderModel", "T5EncoderModel"),
        ("t5", "T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("marian", "MarianMTModel", "MarianMTModel"),
        ("vit", "ViTForImageClassification", "ViTForImageClassification"),
        ("wav2vec2", "Wav2Vec2ForSequenceClassification", "Wav2Vec2ForSequenceClassification"),
        ("bert", "BertForPreTraining", "BertForPreTraining"),
        ("bert", "BertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("qwen2_vl", "Qwen2VLForConditionalGeneration", "Qwen2VLForConditionalGeneration"),
    ],
)
def test_the_class_in_the_snippet_is_the_one_that_was_converted(
    kind, name, shown, tmp_path
) -> None:
    config = {"model_type": kind, "architectures": [name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert auto_class(read_json(tmp_path / "config.json").content) == shown
    found = getattr(transformers, shown)
    if found.__name__.startswith("Auto"):
        found = found._model_mapping[transformers.CONFIG_MAPPING[kind]]
    assert found is getattr(transformers, name)
