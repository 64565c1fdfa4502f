"""Merging adapters that were trained with PEFT and saved by it: the merged model computes what the
PeftModel computes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import loftq_cli
from loftq_cli.errors import InputError
from loftq_cli.loading.warned import DetachedAdapter
from loftq_cli.machine.observer import Observer
from loftq_cli.merging.merge import merge
from tests.support import models
from tests.support.contents import FAST, stored
from tests.support.training import STEADY, begun, continued, load, logits, train

pytestmark = [
    # Adapters of one's own leave quantized layers without theirs.
    pytest.mark.filterwarnings("ignore::loftq_cli.loading.warned.DetachedAdapter"),
    # The adapter that a conversion makes holds no head; training adds it.
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
]

CLASSIFIER = transformers.AutoModelForSequenceClassification
LINEAR = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "bert": ["query", "value", "intermediate.dense"],
    "bart": ["q_proj", "fc1"],
}


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``converted(kind, **settings)``: shared, not to be written to."""

    @functools.cache
    def output(kind: str, **settings: Any) -> Path:
        bert = functools.partial(models.bert, **STEADY["bert"])
        makers: dict[str, Any] = {
            "llama": models.llama,
            "bart": functools.partial(models.bart, **STEADY["bart"]),
            "bert": bert,
            "classifier": functools.partial(bert, task="ForSequenceClassification"),
            "two-labels": functools.partial(bert, num_labels=2),
        }
        directory = tmp_path_factory.mktemp(kind)
        model = models.save(makers[kind](), directory / "model")
        loftq_cli.convert(model, directory / "out", **{**FAST, **settings})
        return directory / "out"

    return output


def check(
    trained: Any, output: Path, directory: Path, model_class: Any, **options: Any
) -> dict[str, Any]:
    """Save ``trained`` with PEFT, merge, load, and compare what both compute."""
    trained.save_pretrained(directory / "trained")
    expected = logits(trained)
    result = merge(output, directory / "merged", adapter=directory / "trained", observer=Observer())
    plain = logits(load(model_class, directory / "merged", **options))
    scale = float(expected.abs().max())
    assert torch.allclose(plain, expected, rtol=0, atol=5e-6 * scale), (plain, expected)
    return result


LAYOUTS: dict[str, dict[str, Any]] = {
    "bnb": {"bits": 4, "layout": "bnb"},
    "loftq": {"bits": 2, "layout": "loftq"},
    "dense": {"bits": 2, "layout": "dense", "lora_alpha": 8.0},
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@every_layout
@pytest.mark.parametrize("kind", ["llama", "bart", "classifier"])
def test_the_adapter_of_the_conversion_after_training(
    kind: str, layout: str, converted: Callable[..., Path], tmp_path: Path
) -> None:
    model_class = {
        "llama": transformers.AutoModelForCausalLM,
        "bart": transformers.AutoModelForSeq2SeqLM,
        "classifier": CLASSIFIER,
    }[kind]
    output = converted(kind, **LAYOUTS[layout])
    before = logits(loftq_cli.load(output, model_class))
    trained = continued(model_class.from_pretrained(output), output)
    assert not torch.allclose(logits(trained), before, rtol=0, atol=1e-2)
    result = check(trained, output, tmp_path, model_class)
    assert (result["without_adapter"], result["added"], result["replaced"]) == ([], [], [])
    assert f"{model_class.__name__}.from_pretrained" in result["loading"]


@every_layout
def test_a_task_model_on_a_bare_backbone_with_a_head_of_its_own(
    layout: str, converted: Callable[..., Path], tmp_path: Path
) -> None:
    output = converted("bert", **LAYOUTS[layout])
    base = CLASSIFIER.from_pretrained(output)
    config = {"task_type": "SEQ_CLS", "r": 4, "target_modules": LINEAR["bert"]}
    trained = begun(base, **config)
    result = check(trained, output, tmp_path, CLASSIFIER)
    assert result["added"] == ["classifier.bias", "classifier.weight"]
    assert "AutoModelForSequenceClassification" in result["loading"]
    names = set(stored(output.parent / "model"))
    assert set(stored(tmp_path / "merged")) == {*names, *result["added"]}


def test_the_class_and_the_labels_of_an_added_head_are_in_the_config(
    converted: Callable[..., Path], tmp_path: Path
) -> None:
    output = converted("two-labels", **LAYOUTS["loftq"])
    base = CLASSIFIER.from_pretrained(output, num_labels=5)
    trained = begun(base, target_modules=["query"], modules_to_save=["classifier"])
    check(trained, output, tmp_path, CLASSIFIER)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert len(config["id2label"]) == len(config["label2id"]) == 5


def test_a_classifier_on_a_decoder(converted: Callable[..., Path], tmp_path: Path) -> None:
    output = converted("llama", **LAYOUTS["loftq"])
    base = CLASSIFIER.from_pretrained(output, num_labels=3)
    trained = begun(base, task_type="SEQ_CLS", target_modules=["q_proj"])
    trained.save_pretrained(tmp_path / "trained")
    merge(output, tmp_path / "merged", adapter=tmp_path / "trained", observer=Observer())
    plain, info = CLASSIFIER.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"lm_head.weight"}  # the backbone has it
    assert torch.allclose(logits(plain), logits(trained), rtol=0, atol=1e-5)


def test_a_bare_model_on_the_backbone_of_a_task_model(
    converted: Callable[..., Path], tmp_path: Path
) -> None:
    output = converted("classifier", **LAYOUTS["loftq"])
    with pytest.warns(DetachedAdapter, match=r"use loftq_cli\.load"):  # the start, in this class
        base = transformers.AutoModel.from_pretrained(output)
    settings = {"target_modules": LINEAR["bert"], "modules_to_save": ["pooler"], "bias": "all"}
    trained = begun(base, **settings)
    trained.save_pretrained(tmp_path / "trained")
    result = merge(output, tmp_path / "merged", adapter=tmp_path / "trained", observer=Observer())
    assert {"bert.pooler.dense.weight", "bert.embeddings.LayerNorm.bias"} <= {*result["replaced"]}
    assert result["added"] == []
    model = load(CLASSIFIER, tmp_path / "merged")
    assert torch.allclose(logits(model.bert), logits(trained), rtol=0, atol=1e-5)
    head = "classifier.weight"
    assert torch.equal(stored(tmp_path / "merged")[head], stored(output)[head])


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("kind", ["classifier", "bart"])
def test_trained_biases(
    kind: str, bias: str, converted: Callable[..., Path], tmp_path: Path
) -> None:
    model_class = CLASSIFIER if kind == "classifier" else transformers.AutoModelForSeq2SeqLM
    output = converted(kind, **LAYOUTS["bnb"])
    modules = LINEAR["bart" if kind == "bart" else "bert"]
    saved = {"modules_to_save": ["classifier"]} if kind == "classifier" else {}
    trained = begun(
        model_class.from_pretrained(output), target_modules=modules, bias=bias, r=4, **saved
    )
    result = check(trained, output, tmp_path, model_class)
    assert any(name.endswith(".bias") for name in result["replaced"])


CONFIGS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 3},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 7},
        "alpha_pattern": {"^model.layers.0.*_proj": 20, "v_proj": 1},
        "use_rslora": True,
    },
    "gaussian": {"init_lora_weights": "gaussian"},
    "unquantized": {"target_modules": ["q_proj", "lm_head"]},
    "pattern": {"target_modules": r".*\.1\..*(q|up)_proj", "exclude_modules": ["up_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "one layer": {"layers_to_transform": [1]},
}


# PEFT saves the weight of a head that has a pair.
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_that_scales_or_selects(
    name: str, converted: Callable[..., Path], tmp_path: Path
) -> None:
    output = converted("llama", **LAYOUTS["loftq"])
    model_class = transformers.AutoModelForCausalLM
    config = {"r": 4, "target_modules": LINEAR["llama"], **CONFIGS[name]}
    trained = begun(model_class.from_pretrained(output), **config)
    check(trained, output, tmp_path, model_class)


def test_a_dense_backbone_becomes_what_peft_makes_of_it_bit_for_bit(
    converted: Callable[..., Path], tmp_path: Path
) -> None:
    output = converted("llama", **LAYOUTS["dense"])
    model_class = transformers.AutoModelForCausalLM
    config = {"r": 4, "lora_alpha": 7, "use_rslora": True, "target_modules": LINEAR["llama"]}
    trained = begun(model_class.from_pretrained(output), **config)
    check(trained, output, tmp_path, model_class)
    expected = trained.merge_and_unload().state_dict()
    assert all(
        torch.equal(value, expected[key]) for key, value in stored(tmp_path / "merged").items()
    )


def test_an_untied_head_and_embedding_trained_in_full(
    converted: Callable[..., Path], tmp_path: Path
) -> None:
    output = converted("llama", **LAYOUTS["loftq"])
    model_class = transformers.AutoModelForCausalLM
    saved = ["lm_head", "embed_tokens"]
    trained = begun(
        model_class.from_pretrained(output), target_modules=["q_proj"], modules_to_save=saved
    )
    result = check(trained, output, tmp_path, model_class)
    assert result["replaced"] == ["lm_head.weight", "model.embed_tokens.weight"]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("layout", ["loftq", "dense"])
def test_a_quantized_head(layout: str, converted: Callable[..., Path], tmp_path: Path) -> None:
    output = converted("llama", **LAYOUTS[layout], include=("lm_head.weight",))
    model_class = transformers.AutoModelForCausalLM
    trained = continued(model_class.from_pretrained(output), output)
    check(trained, output, tmp_path, model_class)
    other = converted(
        "llama", **LAYOUTS[layout], include=("lm_head.weight",), seed=1, block_size=32
    )
    config = tmp_path / "trained/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": ""}))
    with pytest.raises(InputError, match=r"lm_head\.base_layer\..* is not the one of"):
        merge(other, tmp_path / "other", adapter=tmp_path / "trained", observer=Observer())


def test_training_in_bfloat16(tmp_path: Path) -> None:
    model = models.save(models.llama(), tmp_path / "model", torch.bfloat16)
    loftq_cli.convert(model, tmp_path / "out", bits=2, layout="dense", **FAST)
    model_class = transformers.AutoModelForCausalLM
    base = model_class.from_pretrained(tmp_path / "out")
    trained = peft.PeftModel.from_pretrained(
        base, tmp_path / "out", subfolder="loftq_init", is_trainable=True
    )
    train(trained).save_pretrained(tmp_path / "trained")
    merge(tmp_path / "out", tmp_path / "merged", adapter=tmp_path / "trained", observer=Observer())
    expected = trained.merge_and_unload().state_dict()
    tensors = stored(tmp_path / "merged")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(torch.equal(value, expected[name]) for name, value in tensors.items())
