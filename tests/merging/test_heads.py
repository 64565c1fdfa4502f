"""Merging adapters of models whose output embedding has another name in memory than on disk, or one
that only its class knows, and whose bias has two: what the merged model computes is what PEFT's
does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.errors import InputError
from loftq_cli.families.anatomy import Anatomy
from loftq_cli.machine.observer import Observer
from loftq_cli.merging import plan as merge_plan
from loftq_cli.merging.merge import merge
from tests.support import models
from tests.support.contents import FAST, stored

pytestmark = [
    pytest.mark.filterwarnings("ignore::loftq_cli.loading.warned.DetachedAdapter"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
]

TOKENS = torch.arange(1, 25).view(2, 12) % 90 + 3
SIZES = {
    "vocab_size": models.VOCABULARY,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "pad_token_id": 0,
}
SMALL = {"vocab_size": models.VOCABULARY, "n_layers": 1, "n_heads": 4}
MODERN = {**SIZES, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", SIZES),
    "distilbert": ("DistilBertForMaskedLM", {**SMALL, "dim": 64, "hidden_dim": 128}),
    "electra": ("ElectraForMaskedLM", {**SIZES, "embedding_size": 64}),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZES),
    "modernbert": ("ModernBertForMaskedLM", MODERN),
    "mpnet": ("MPNetForMaskedLM", SIZES),
    "roberta": ("RobertaForMaskedLM", {**SIZES, "max_position_embeddings": 40}),
    "xlm": ("XLMWithLMHeadModel", {**SMALL, "emb_dim": 64}),
}
PUBLISHED = {
    "gpt_neox": ((r"^lm_head\.", "embed_out."),),
    "bert": (
        (r"LayerNorm\.weight$", "LayerNorm.gamma"),
        (r"LayerNorm\.bias$", "LayerNorm.beta"),
    ),
}


def convert(kind: str, directory: Path, *, name: str | None = None, published: bool = False) -> Any:
    """(class, conversion) of a small model, its tensors named as they were ``published``."""
    model_class = getattr(transformers, name or MODELS[kind][0])
    config = transformers.AutoConfig.for_model(kind, **MODELS[kind][1])
    source = models.save(models._randomised(model_class, config), directory / "model")
    if published:
        tensors = load_file(source / "model.safetensors")
        for old, new in PUBLISHED[kind]:
            tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
    loftq_cli.convert(source, directory / "out", bits=2, layout="loftq", **FAST)
    return model_class, directory / "out"


def trained(model_class: Any, output: Path, size: int | None = None, **config: Any) -> Any:
    """An adapter of one's own on the backbone, with everything that can be trained moved."""
    base = model_class.from_pretrained(output)
    if size is not None:
        base.resize_token_embeddings(size)
    matrices = json.loads((output / "loftq_manifest.json").read_text())["matrices"]
    names = [matrix.get("in_memory", matrix["module"]) for matrix in matrices]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=names, **config))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def check(model_class: Any, output: Path, model: Any, directory: Path) -> dict[str, torch.Tensor]:
    """Save ``model``, merge, load, compare; the merged tensors."""
    model.save_pretrained(directory / "trained")
    merge(output, directory / "merged", adapter=directory / "trained", observer=Observer())
    merged, info = model_class.from_pretrained(directory / "merged", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        expected, plain = (each.eval()(input_ids=TOKENS)[0] for each in (model, merged))
    assert plain.shape == expected.shape
    assert torch.allclose(plain, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    return stored(directory / "merged")


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "bert"])
def test_more_tokens_where_only_the_class_knows_its_head(kind: str, tmp_path: Path) -> None:
    model_class, output = convert(kind, tmp_path, published=kind == "gpt_neox")
    tensors = check(model_class, output, trained(model_class, output, 100), tmp_path)
    assert tensors.keys() == load_file(tmp_path / "model/model.safetensors").keys()


def test_a_head_whose_name_differs_in_memory_takes_the_place_of_the_one_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_class, output = convert("gpt_neox", tmp_path, published=True)
    model = trained(model_class, output, modules_to_save=["lm_head"])
    assert "lm_head.weight" not in check(model_class, output, model, tmp_path)
    # Where nobody knows that both are one, a second head is not written beside the first.
    monkeypatch.setattr(merge_plan, "recorded", lambda output: {})
    monkeypatch.setattr(merge_plan, "anatomy", lambda *_, **__: Anatomy(unknown="a test"))
    monkeypatch.setattr(merge_plan, "token_tables", lambda config: None)
    with pytest.raises(InputError, match=r"no place for 'base_model\.model\.lm_head\.weight'"):
        merge(output, tmp_path / "m", adapter=tmp_path / "trained", observer=Observer())


@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification"])
def test_trained_biases_that_have_other_names_on_disk(name: str, tmp_path: Path) -> None:
    """Of a plain class the manifest records no names."""
    model_class, output = convert("bert", tmp_path, name=name, published=True)
    check(model_class, output, trained(model_class, output, bias="all"), tmp_path)


def test_a_bias_that_the_class_has_under_two_names(tmp_path: Path) -> None:
    model_class, output = convert("bert", tmp_path)
    ways: dict[str, dict[str, Any]] = {
        "resized": {"size": 100, "modules_to_save": ["word_embeddings", "decoder"]},
        "in full": {"modules_to_save": ["word_embeddings", "decoder"]},
        "the whole head": {"size": 100, "modules_to_save": ["word_embeddings", "cls"]},
        "biases": {"bias": "all"},
    }
    for way, config in ways.items():
        tensors = check(model_class, output, trained(model_class, output, **config), tmp_path / way)
        untied = "cls.predictions.decoder.weight" in tensors
        assert untied == (way != "biases")
        # transformers ties the biases only if it ties the embeddings.
        assert ("cls.predictions.decoder.bias" in tensors) == untied
