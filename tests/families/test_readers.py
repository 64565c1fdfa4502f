"""Who reads what the norms of a model give, as its own code says."""

from __future__ import annotations

from typing import Any

import pytest

from loftq_cli.families.readers import norm_readers
from tests.support import models

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": models.VOCABULARY,
}


def readers(model_type: str, architecture: str, **settings: Any) -> dict[str, tuple[Any, ...]]:
    """(the ends of the names of its readers, who else, offset) of each norm of block 0, and of
    those outside of blocks."""
    config = {"model_type": model_type, "architectures": [architecture], **SIZES, **settings}
    found = norm_readers(config)
    assert not isinstance(found, str), found
    return {
        name: (sorted(e.rpartition(".")[2] for e in each.linears), each.others, each.offset)
        for name, each in found.items()
        if ".1." not in name
    }


def test_one_reader_after_the_other() -> None:
    assert readers("llama", "LlamaForCausalLM") == {
        "model.layers.0.input_layernorm": (["k_proj", "q_proj", "v_proj"], (), 0.0),
        "model.layers.0.post_attention_layernorm": (["gate_proj", "up_proj"], (), 0.0),
        "model.norm": (["lm_head"], (), 0.0),
    }


def test_norms_of_one_plus_the_weight_and_norms_that_are_added() -> None:
    found = readers("gemma2", "Gemma2ForCausalLM", head_dim=16, num_key_value_heads=2)
    assert {offset for _, _, offset in found.values()} == {1.0}
    layer = "model.layers.0"
    assert found[f"{layer}.pre_feedforward_layernorm"][:2] == (["gate_proj", "up_proj"], ())
    assert found[f"{layer}.post_feedforward_layernorm"][:2] == ([], (layer,))


def test_norms_of_heads_are_read_by_the_attention() -> None:
    found = readers("qwen3", "Qwen3ForCausalLM", num_key_value_heads=2, head_dim=16)
    attention = "model.layers.0.self_attn"
    assert found[f"{attention}.q_norm"][:2] == ([], (attention,))


def test_attention_and_mlp_beside_one_another_and_transposed_layers() -> None:
    found = readers("phi", "PhiForCausalLM")
    linears, others, offset = found["model.layers.0.input_layernorm"]
    assert (linears, others, offset) == (["fc1", "k_proj", "q_proj", "v_proj"], (), 0.0)
    found = readers("gpt2", "GPT2LMHeadModel", n_embd=64, n_layer=2, n_head=4)
    assert found["transformer.h.0.ln_1"] == (["c_attn"], (), 0.0)


def test_what_is_read_and_added() -> None:
    found = readers("bert", "BertModel")
    linears, others, _ = found["embeddings.LayerNorm"]
    assert linears == ["key", "query", "value"]
    assert others == ("encoder.layer.0.attention.output",)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "nobodys"}, "transformers has no class for nobodys"),
        ({"model_type": "vit", "architectures": ["ViTModel"], **SIZES}, "cannot be followed"),
    ],
)
def test_why_a_model_cannot_be_followed(config: dict[str, Any], words: str) -> None:
    found = norm_readers(config)
    assert isinstance(found, str)
    assert words in found
    assert "\n" not in found
