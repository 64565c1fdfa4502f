"""Merging adapters of models whose embeddings were resized, trained in full, by rows or with a
pair, tied and not: the merged model computes what the PeftModel computes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.errors import InputError, UnsupportedInputError
from loftq_cli.machine.observer import Observer
from loftq_cli.merging.merge import merge
from tests.support import models
from tests.support.contents import FAST, stored
from tests.support.training import STEADY, begun, load, logits

pytestmark = [
    # Adapters of one's own leave quantized layers without theirs.
    pytest.mark.filterwarnings("ignore::loftq_cli.loading.warned.DetachedAdapter"),
    pytest.mark.filterwarnings("ignore::loftq_cli.loading.warned.UnsavedEmbeddings"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),
]

CAUSAL = transformers.AutoModelForCausalLM
BOTH = ["embed_tokens", "lm_head"]
MAKERS: dict[str, Callable[[], Any]] = {
    "untied": models.llama,
    "tied": functools.partial(models.llama, tie_word_embeddings=True),
    "bart": functools.partial(models.bart, **STEADY["bart"]),
    "bert": functools.partial(models.bert, task="ForMaskedLM", **STEADY["bert"]),
}


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``converted(kind, **settings)``: shared, not to be written to."""

    @functools.cache
    def output(kind: str, **settings: Any) -> Path:
        directory = tmp_path_factory.mktemp(kind)
        model = models.save(MAKERS[kind](), directory / "model")
        options = {"bits": 2, "layout": "loftq", **FAST, **settings}
        loftq_cli.convert(model, directory / "out", **options)
        return directory / "out"

    return output


def check(
    trained: Any, output: Path, directory: Path, model_class: Any = CAUSAL, **options: Any
) -> Any:
    """Save ``trained``, merge, load, compare; the config of the merged model."""
    trained.save_pretrained(directory / "trained", **options)
    merge(output, directory / "merged", adapter=directory / "trained", observer=Observer())
    expected = logits(trained)
    model = load(model_class, directory / "merged")
    plain = logits(model)
    assert plain.shape == expected.shape
    assert torch.allclose(plain, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    return model.config


# What is in the LoraConfig, and how many embeddings of a tied model come out.
WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "nothing": ({}, 1),
    "both in full": ({"modules_to_save": BOTH}, 2),
    "both in full, tied": ({"modules_to_save": BOTH, "ensure_weight_tying": True}, 1),
    "the input's in full": ({"modules_to_save": ["embed_tokens"]}, 2),
    "one in full, tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, 1),
    "the head in full": ({"modules_to_save": ["lm_head"]}, 2),
    "tokens": ({"trainable_token_indices": [3, 90]}, 1),
    "other tokens": ({"trainable_token_indices": {"embed_tokens": [3, 90], "lm_head": [5]}}, 2),
    "pairs": ({"target_modules": ["q_proj", *BOTH]}, 2),
    "tied pairs": ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, 1),
}


@pytest.mark.parametrize("size", [96, 100, 90])
@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("way", WAYS)
def test_embeddings_that_were_resized_and_trained(
    way: str, kind: str, size: int, converted: Callable[..., Path], tmp_path: Path
) -> None:
    output = converted(kind)
    config, count = WAYS[way]
    base = CAUSAL.from_pretrained(output)
    if size != models.VOCABULARY:
        base.resize_token_embeddings(size)
    if size == 90:
        config = json.loads(json.dumps(config).replace("90", "80"))
    trained = begun(base, **{"r": 4, "target_modules": ["q_proj"], **config})
    alone = size == 96 and kind == "tied" and way == "the input's in full"
    if kind == "untied" and way == "tied pairs" and size != 96:  # PEFT saves only one of them
        trained.save_pretrained(tmp_path / "trained")
        with pytest.raises(InputError, match="does not hold both embeddings that were resized"):
            merge(output, tmp_path / "m", adapter=tmp_path / "trained", observer=Observer())
        return
    saved = {"save_embedding_layers": True} if alone else {}
    found = check(trained, output, tmp_path, **saved)
    assert found.vocab_size == size
    tensors = stored(tmp_path / "merged")
    assert ("lm_head.weight" in tensors) == (kind == "untied" or count == 2)
    assert found.tie_word_embeddings == ("lm_head.weight" not in tensors)


def test_an_encoder_and_decoder_that_were_resized(
    converted: Callable[..., Path], tmp_path: Path
) -> None:
    model_class = transformers.AutoModelForSeq2SeqLM
    base = model_class.from_pretrained(converted("bart"))
    base.resize_token_embeddings(100)
    trained = begun(base, target_modules=["q_proj", "fc1"])
    config = check(trained, converted("bart"), tmp_path, model_class)
    assert config.vocab_size == 100
    assert stored(tmp_path / "merged").keys() == stored(converted("bart").parent / "model").keys()


def test_a_masked_language_model_with_a_bias_a_token(
    converted: Callable[..., Path], tmp_path: Path
) -> None:
    model_class = transformers.AutoModelForMaskedLM
    base = model_class.from_pretrained(converted("bert"))
    base.resize_token_embeddings(100)
    trained = begun(base, target_modules=["query"])
    with torch.no_grad():
        base.cls.predictions.decoder.bias.copy_(torch.randn(100))
    check(trained, converted("bert"), tmp_path, model_class)


def test_copies_of_one_embedding_stay_copies(tmp_path: Path) -> None:
    """Checkpoints of an older transformers hold a tied embedding several times."""
    model = models.save(MAKERS["tied"](), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    output = tmp_path / "out"
    loftq_cli.convert(model, output, bits=2, layout="loftq", **FAST)
    base = CAUSAL.from_pretrained(output)
    trained = begun(base, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    config = check(trained, output, tmp_path)
    assert config.tie_word_embeddings
    tensors = stored(tmp_path / "merged")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_a_table_that_was_quantized_and_is_trained_in_full_with_more_tokens(
    converted: Callable[..., Path], tmp_path: Path
) -> None:
    output = converted("untied", layout="dense", embeddings=True)
    base = CAUSAL.from_pretrained(output)
    base.resize_token_embeddings(100)
    trained = begun(base, target_modules=["q_proj"], modules_to_save=BOTH)
    assert check(trained, output, tmp_path).vocab_size == 100


def test_the_config_of_the_text_model_has_the_number_of_tokens(tmp_path: Path) -> None:
    text = {**models.llama().config.to_dict(), "model_type": "llama"}
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config={
            "model_type": "clip_vision_model",
            "image_size": 16,
            "patch_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "hidden_size": 64,
            "intermediate_size": 64,
        },
        image_token_index=95,
    )
    model_class = transformers.LlavaForConditionalGeneration
    model = models.save(models._randomised(model_class, config), tmp_path / "model")
    output = tmp_path / "out"
    loftq_cli.convert(model, output, bits=2, layout="loftq", **FAST)
    base = model_class.from_pretrained(output)
    base.resize_token_embeddings(100)
    trained = begun(base, target_modules=["q_proj"])
    found = check(trained, output, tmp_path, model_class, save_embedding_layers=True)
    assert found.text_config.vocab_size == 100


@pytest.mark.parametrize(
    "config",
    [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj", "embed_tokens"]}],
)
def test_one_of_two_tied_embeddings_alone_is_refused_with_what_to_do(
    config: dict[str, Any], converted: Callable[..., Path], tmp_path: Path
) -> None:
    """The adapter does not say what the other one is called."""
    base = CAUSAL.from_pretrained(converted("tied"))
    begun(base, **{"target_modules": ["q_proj"], **config}).save_pretrained(tmp_path / "trained")
    with pytest.raises(UnsupportedInputError, match="this one was trained alone") as caught:
        merge(converted("tied"), tmp_path / "m", adapter=tmp_path / "trained", observer=Observer())
    assert "save_embedding_layers=True" in caught.value.hint


def tokenizer_with(directory: Path, *more: str) -> Any:
    models.save_tokenizer(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(list(more))
    return tokenizer


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> tuple[Path, Any]:
    """A conversion with a tokenizer as large as its vocabulary, and one with three tokens more."""
    model = models.save(models.llama(), tmp_path / "model")
    count = len(tokenizer_with(model))
    fill = [f"<{number}>" for number in range(count, models.VOCABULARY)]
    tokenizer_with(model, *fill).save_pretrained(model)
    (model / "special_tokens_map.json").write_text("{}")
    loftq_cli.convert(model, tmp_path / "out", bits=2, layout="loftq", **FAST)
    return tmp_path / "out", tokenizer_with(tmp_path / "work", *fill, "new", "newer", "newest")


@pytest.mark.parametrize("place", ["trained", "out"])
def test_a_resize_that_the_adapter_does_not_hold_is_noticed_by_the_tokenizer(
    place: str, with_tokenizer: tuple[Path, Any], tmp_path: Path
) -> None:
    output, tokenizer = with_tokenizer
    base = CAUSAL.from_pretrained(output)
    base.resize_token_embeddings(len(tokenizer))
    trained = begun(base, target_modules=["q_proj"])
    trained.save_pretrained(tmp_path / place, save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path / place)
    options: dict[str, Any] = {"adapter": tmp_path / place, "observer": Observer()}
    with pytest.raises(InputError, match=r"99 tokens, .* 96 rows") as caught:
        merge(output, tmp_path / "merged", **options)
    assert "save_embedding_layers=True" in caught.value.hint
    trained.save_pretrained(tmp_path / place, save_embedding_layers=True)
    merge(output, tmp_path / "merged", **options)


def test_the_tokenizer_beside_the_adapter_is_that_of_the_result(
    with_tokenizer: tuple[Path, Any], tmp_path: Path
) -> None:
    output, tokenizer = with_tokenizer
    base = CAUSAL.from_pretrained(output)
    base.resize_token_embeddings(len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "trained")
    check(begun(base, target_modules=["q_proj"]), output, tmp_path)
    merged = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged("newest").input_ids == tokenizer("newest").input_ids
    # A file of the other tokenizer, which the new one does without.
    assert not (tmp_path / "merged/special_tokens_map.json").exists()


def test_a_tokenizer_that_training_did_not_change_keeps_all_its_files(
    with_tokenizer: tuple[Path, Any], tmp_path: Path
) -> None:
    output, _ = with_tokenizer
    same = transformers.AutoTokenizer.from_pretrained(output)
    same.save_pretrained(tmp_path / "trained")
    (tmp_path / "trained/generation_config.json").write_text('{"of": "nobody"}')
    check(begun(CAUSAL.from_pretrained(output), target_modules=["q_proj"]), output, tmp_path)
    assert (tmp_path / "merged/special_tokens_map.json").read_text() == "{}"
    source = (output / "generation_config.json").read_bytes()
    assert (tmp_path / "merged/generation_config.json").read_bytes() == source
