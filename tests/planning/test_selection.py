"""Which tensors of real model families are quantized, and why the others are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.checkpoint.source import open_source
from loftq_cli.errors import PatternError, UnsupportedInputError, UsageError
from loftq_cli.planning.selection import select
from tests.support.families import FAMILIES, KEPT


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tensors of a family's checkpoint, under the names that transformers saves."""
    cache: dict[str, list[StoredTensor]] = {}

    def tensors(family: str) -> list[StoredTensor]:
        if family not in cache:
            model_class, settings, _ = FAMILIES[family]
            directory = tmp_path_factory.mktemp(family)
            config = transformers.AutoConfig.for_model(family, **settings)
            getattr(transformers, model_class)(config).save_pretrained(directory)
            cache[family] = open_source(directory).tensors
        return cache[family]

    return tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_the_linear_layers_of_attention_and_mlp_are_selected_and_nothing_else(
    family: str, saved: Any
) -> None:
    expected = {
        f"{stack}.{block}.{layer}.weight"
        for stack, layers in FAMILIES[family][2].items()
        for block in (0, 1)
        for layer in layers
    }
    selection = select(saved(family), {})
    assert {tensor.name for tensor in selection.matrices} == expected
    assert len(selection.matrices) + len(selection.kept) == len(saved(family))


@pytest.mark.parametrize(("family", "name", "reason"), KEPT)
def test_what_is_passed_through_says_why(family: str, name: str, reason: str, saved: Any) -> None:
    kept = {tensor.name: reason for tensor, reason in select(saved(family), {}).kept}
    assert kept[name] == reason


def tensor(name: str, *shape: int, dtype: str = "F32") -> StoredTensor:
    return StoredTensor(name, dtype, shape, 0)


BLOCK = [
    tensor("model.embed_tokens.weight", 8, 4),
    tensor("model.layers.0.q_proj.weight", 4, 4),
    tensor("model.layers.0.q_proj.bias", 4),
    tensor("model.layers.0.k_proj.weight", 4, 4),
    tensor("model.layers.0.norm.weight", 4),
    tensor("lm_head.weight", 8, 4),
]


def selected(**patterns: Any) -> list[str]:
    return [tensor.name for tensor in select(BLOCK, {}, **patterns).matrices]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({}, {"model.layers.0.q_proj.weight", "model.layers.0.k_proj.weight"}),
        ({"exclude": ["*.q_proj.*"]}, {"model.layers.0.k_proj.weight"}),
        ({"exclude": ["*.[q]_proj.weight"]}, {"model.layers.0.k_proj.weight"}),
        (
            {"include": ["lm_head.*"], "exclude": ["*.q_proj.*"]},
            {"model.layers.0.k_proj.weight", "lm_head.weight"},
        ),
        (
            {"include": ["*.q_proj.*", "lm_head.weight"], "exclude": ["lm_head*", "*.k_proj.*"]},
            {"model.layers.0.q_proj.weight"},
        ),
    ],
    ids=["default", "exclude", "character class", "both", "exclude beats include"],
)
def test_patterns_are_globs_over_tensor_names(patterns: Any, expected: set[str]) -> None:
    assert set(selected(**patterns)) == expected


def test_only_what_the_default_rule_leaves_out_counts_as_included() -> None:
    selection = select(BLOCK, {}, include=["lm_head.*", "*.q_proj.*"])
    included = {name for name, why in selection.reasons.items() if "--include" in why}
    assert included == {"lm_head.weight"}


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_shows_near_names(option: str) -> None:
    with pytest.raises(PatternError) as caught:
        selected(**{option: ["*.qproj.weight"]})
    assert caught.value.exit_code == 2
    assert f"--{option}" in caught.value.message
    assert "'*.qproj.weight'" in caught.value.message
    assert "model.layers.0.q_proj.weight" in caught.value.message


@pytest.mark.parametrize("pattern", ["*.bias", "model.layers.0.norm.weight"])
def test_a_bias_or_a_norm_cannot_be_included(pattern: str) -> None:
    with pytest.raises(PatternError, match="no weight matrix"):
        selected(include=[pattern])


@pytest.mark.parametrize("asked", [{"embeddings": True}, {"include": ["*embed_tokens*"]}])
def test_a_word_embedding_is_quantized_on_request(asked: dict[str, Any]) -> None:
    selection = select(BLOCK, {}, **asked)
    name = "model.embed_tokens.weight"
    assert name in {tensor.name for tensor in selection.matrices}
    assert selection.kinds[name] == "embedding"
    assert f"--{next(iter(asked))}" in selection.reasons[name]
    assert name not in {tensor.name for tensor in select(BLOCK, {}).matrices}


@pytest.mark.parametrize("option", ["embeddings", "include"])
@pytest.mark.parametrize(
    ("name", "config", "other"),
    [
        ("model.embed_tokens.weight", {"architectures": ["LlamaForCausalLM"]}, "output embedding"),
        ("shared.weight", {"is_encoder_decoder": True}, "encoder and decoder"),
    ],
)
def test_an_embedding_that_something_else_uses_is_refused(
    option: str, name: str, config: dict[str, Any], other: str
) -> None:
    linear = tensor("model.layers.0.q_proj.weight", 4, 4)
    asked = {"embeddings": True} if option == "embeddings" else {"include": [name]}
    with pytest.raises(UsageError, match=other):
        select([linear, tensor(name, 24, 4)], config, **asked)


def test_an_embedding_that_is_tied_and_stored_twice_is_refused() -> None:
    tensors = [
        tensor("model.layers.0.q_proj.weight", 4, 4),
        tensor("model.embed_tokens.weight", 24, 4),
        tensor("lm_head.weight", 24, 4),
    ]
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    with pytest.raises(UsageError, match="output embedding"):
        select(tensors, config, embeddings=True)


def test_a_head_of_its_own_leaves_the_embedding_alone() -> None:
    tensors = [
        tensor("model.layers.0.q_proj.weight", 4, 4),
        tensor("model.embed_tokens.weight", 24, 4),
        tensor("lm_head.weight", 24, 4),
    ]
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    assert len(select(tensors, config, embeddings=True).matrices) == 2


def test_positions_are_no_words() -> None:
    positions = tensor("embeddings.position_embeddings.weight", 8, 4)
    with pytest.raises(UsageError, match="not of words"):
        select([*BLOCK, positions], {}, include=["*position*"])
    with pytest.raises(UsageError, match="no word embedding"):
        select([tensor("model.layers.0.q_proj.weight", 4, 4), positions], {}, embeddings=True)


def test_an_embedding_that_is_excluded_again_is_no_error() -> None:
    assert len(selected(include=["*"], exclude=["*embed*"])) == 3


def test_excluding_every_matrix_is_a_usage_error() -> None:
    with pytest.raises(UsageError) as caught:
        selected(exclude=["model.layers.*"])
    assert caught.value.exit_code == 2
    assert "--exclude" in caught.value.message


def test_a_checkpoint_without_matrices_says_what_it_holds_instead() -> None:
    with pytest.raises(UnsupportedInputError, match=r"1 embedding, 1 head"):
        select([BLOCK[0], BLOCK[-1]], {})


@pytest.mark.parametrize("dtype", ["C64", "I32", "U8", "BOOL"])
def test_a_matrix_of_another_dtype_is_passed_through(dtype: str) -> None:
    odd = tensor("model.layers.1.k_proj.weight", 4, 4, dtype=dtype)
    assert (odd, f"dtype {dtype}") in select([*BLOCK, odd], {}).kept


def test_an_empty_matrix_is_passed_through() -> None:
    empty = tensor("model.layers.1.k_proj.weight", 0, 4)
    assert (empty, "empty") in select([*BLOCK, empty], {}).kept


def test_gpt2_stores_its_matrices_transposed(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=24, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).to(torch.float32).save_pretrained(tmp_path)
    source = open_source(tmp_path)
    selection = select(source.tensors, source.config.content)
    layers = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    names = {f"transformer.h.0.{layer}.weight" for layer in layers}
    assert {tensor.name for tensor in selection.matrices} == names
    assert set(selection.kinds.values()) == {"conv1d"}
