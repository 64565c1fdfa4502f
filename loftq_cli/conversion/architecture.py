"""What a tensor is in its model, from its name and config.json alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from loftq_cli.layouts.base import Kind

EMBEDDING = re.compile(
    r"(?:^|[._])(?:embed(?!_out)\w*|\w*embeddings?|wte|wpe|shared|relative_attention_bias)(?:\.|$)"
)
"""Tables of any kind, positions and token types among them."""

_WORD_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|word_embeddings?|wte|embed_in|tok_embeddings|tokens_embed"
    r"|token_embedding|shared)\.weight$"
)

# Architectures that have an output embedding, which may be the input embedding.
_LANGUAGE_MODELS = (
    "ForCausalLM",
    "ForConditionalGeneration",
    "ForMaskedLM",
    "ForPreTraining",
    "DoubleHeadsModel",
    "LMHeadModel",
)
_OUTPUT_EMBEDDING = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|output_projection|predictions\.decoder|proj_out)\.weight$"
)

# transformers' Conv1D, which stores its weight transposed, is used by these families, for the
# layers of these names.
_CONV1D_MODELS = ("clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")
_CONV1D = re.compile(r"(?:^|\.)(?:c_attn|q_attn|c_proj|c_fc)\.weight$")

# T5's feed-forward casts its input to the dtype of ``wo``, which packed codes would break;
# transformers keeps that layer in floating point, and so do we.
_WO_MODELS = (
    "t5",
    "mt5",
    "umt5",
    "longt5",
    "udop",
    "pop2piano",
    "switch_transformers",
    "pix2struct",
)


def kind_of(name: str, config: Mapping[str, Any]) -> Kind:
    """What the two-dimensional tensor ``name`` is the weight of."""
    if _WORD_EMBEDDING.search(name):
        return "embedding"
    if _CONV1D.search(name) and any(kind in _CONV1D_MODELS for kind in _model_types(config)):
        return "conv1d"
    return "linear"


def kept_by_transformers(name: str, config: Mapping[str, Any]) -> bool:
    """Whether transformers needs this weight in floating point."""
    return name.endswith(".wo.weight") and config.get("model_type") in _WO_MODELS


def has_output_embedding(names: Collection[str]) -> bool:
    """Whether the output embedding is among the tensors, apart from the input embedding."""
    return any(_OUTPUT_EMBEDDING.search(name) for name in names)


def is_embedding(name: str) -> bool:
    """Whether this is the input or the output embedding."""
    return bool(_WORD_EMBEDDING.search(name) or _OUTPUT_EMBEDDING.search(name))


def ties_embeddings(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether the model of config.json uses its input embedding as output embedding too, given the
    names of all tensors of the checkpoint."""
    stated = _stated(config)
    return False not in stated and _has_head(config) and not has_output_embedding(names)


def _has_head(config: Mapping[str, Any]) -> bool:
    architectures = config.get("architectures") or [""]
    return str(architectures[0]).endswith(_LANGUAGE_MODELS)


def _stated(config: Mapping[str, Any]) -> list[object]:
    """What config.json says of ``tie_word_embeddings``."""
    parts = (config, config.get("text_config"))
    return [part.get("tie_word_embeddings") for part in parts if isinstance(part, Mapping)]


def shared_with(name: str, config: Mapping[str, Any], names: Collection[str]) -> str | None:
    """What else of the model uses the word embedding ``name``, None where nothing does."""
    if name.endswith("shared.weight"):
        return "the embeddings of encoder and decoder"
    # Stored twice but said to be tied: transformers ties them again.
    if ties_embeddings(config, names) or (True in _stated(config) and _has_head(config)):
        return "the output embedding"
    return None


def _model_types(config: Mapping[str, Any]) -> Iterator[object]:
    """``model_type`` of the model and of the models that it is made of."""
    yield config.get("model_type")
    for part in config.values():
        if isinstance(part, Mapping):
            yield from _model_types(part)
