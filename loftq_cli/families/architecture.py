"""What a tensor is in its model, from its name and config.json alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.families.blocks import layers_by_stack
from loftq_cli.families.experts import MISTAKEN, is_expert, mistaken
from loftq_cli.families.kinds import Kind

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

TEXT_CONFIGS = ("thinker_config", "text_encoder", "decoder", "generator", "text_config")
"""Where transformers looks for the config of the text model (PreTrainedConfig.get_text_config); the
first is of models that have it one level deeper."""

NORM = re.compile(r"(?:norm|(?:^|\.)ln_?\w*)\.weight$", re.IGNORECASE)
HEAD = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|classifier|classification_heads?|pooler|score|qa_outputs|heads?)\."
)
HEAD_BIAS = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|output_projection|predictions|proj_out)(?:\.decoder)?\.bias$"
)
FINAL_BIAS = re.compile(r"(?:^|\.)final_logits_bias$")
"""What BART and its kin add to the logits, (1, tokens); transformers resizes it with zeros."""

ADDED_HEADS = (
    "classification_head",
    "classifier",
    "cls",
    "decoder",
    "discriminator_predictions",
    "embed_out",
    "generator_lm_head",
    "generator_predictions",
    "head",
    "lm_head",
    "lm_loss",
    "lm_predictions",
    "logits_proj",
    "output_projection",
    "pooler",
    "pre_classifier",
    "pred_layer",
    "predictions",
    "proj_out",
    "qa_outputs",
    "score",
    "sop_classifier",
    "vocab_projector",
    "vocab_transform",
)
"""Heads that the model class has and the checkpoint may not: those that a task adds to a bare
model, and those tied to the embeddings."""

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

_ROUTER = re.compile(r"(?:router\w*(?:\.\w+)*|(?:^|\.)(?:gate|wg|shared_expert_gate))\.weight$")
_NO_ROUTER = re.compile(
    r"(?:^|[._])(?:[qkvo]_proj|query|key|value|qkv|q|k|v|o|out_proj|dense|kv_\w+|q_[ab]_proj"
    r"|(?:gate|up|down)_proj)\.weight$"
)
_EXPERT_COUNTS = (
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    *("num_routed_experts", "n_experts", "num_moe_experts", "moe_num_primary_router_experts"),
)

_MAMBA_MODELS = (  # the first five PEFT refuses by name
    *("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"),
    *("bamba", "granitemoehybrid", "zamba2"),
)
_MAMBA_OUT = re.compile(r"(?:^|\.)(?:mamba\w*|mixer)\.out_proj\.weight$")

_LAYER_COUNT = re.compile(r"layer|depth|block")
_PREDICTION = re.compile(r"(?:^|\.)(?:mtp|mtp_layers|mtp_block|nextn)\.")
_PREDICTION_COUNTS = ("num_nextn_predict_layers", "num_mtp_modules", "mtp_num_hidden_layers")


def kind_of(name: str, config: Mapping[str, Any]) -> Kind:
    """What the two-dimensional tensor ``name`` is the weight of."""
    if _WORD_EMBEDDING.search(name):
        return "embedding"
    if _CONV1D.search(name) and any(kind in _CONV1D_MODELS for kind in _model_types(config)):
        return "conv1d"
    return "linear"


def left_alone(tensors: Sequence[StoredTensor], config: Mapping[str, Any]) -> dict[str, str]:
    """Why matrices stay as they are, by tensor, as far as names, shapes and config.json tell."""
    types = set(_model_types(config))
    beyond = _beyond_the_model([tensor.name for tensor in tensors], config)
    experts = set(_numbers(config, _EXPERT_COUNTS.__contains__))
    found = {}
    for tensor in tensors:
        if tensor.name.endswith(".wo.weight") and types.intersection(_WO_MODELS):
            found[tensor.name] = "kept in floating point by transformers"
        elif is_router(tensor, experts):
            found[tensor.name] = "router"
        elif _MAMBA_OUT.search(tensor.name) and config.get("model_type") in _MAMBA_MODELS:
            found[tensor.name] = "kernels of Mamba take the weight itself, and PEFT refuses it"
        elif mistaken(tensor.name, config):
            found[tensor.name] = MISTAKEN
        elif tensor.name in beyond:
            found[tensor.name] = "beyond the blocks that config.json counts"
    return found


def is_router(tensor: StoredTensor, experts: Collection[int]) -> bool:
    """Whether a matrix chooses among experts, by its name, or because it has as many outputs as
    there are ``experts`` and is no part of an attention or an MLP."""
    if len(tensor.shape) != 2 or is_expert(tensor.name):
        return False
    if _ROUTER.search(tensor.name):
        return True
    return tensor.shape[0] in experts and not _NO_ROUTER.search(tensor.name)


def _beyond_the_model(names: Collection[str], config: Mapping[str, Any]) -> set[str]:
    """The tensors of prediction heads that are stored as further blocks, which transformers does
    not load: behind the last one (GLM-4-MoE, DeepSeek-V3), or apart (``mtp``)."""
    found = {name for name in names if _PREDICTION.search(name)}
    further = max(_numbers(config, _PREDICTION_COUNTS.__contains__), default=1)
    text = config.get("text_config")
    parts = (config, text if isinstance(text, Mapping) else {})
    counts = [part["num_hidden_layers"] for part in parts if "num_hidden_layers" in part]
    known = set(_numbers(config, _LAYER_COUNT.search))
    for blocks in layers_by_stack(names).values():
        size = len(blocks)
        first = next((n for n in counts if type(n) is int and 0 < size - n <= further), None)
        if first is not None and size not in known and set(blocks) == set(range(size)):
            found |= {name for number in range(first, size) for name in blocks[number]}
    return found


def _numbers(config: Mapping[str, Any], wanted: Callable[[str], object]) -> Iterator[int]:
    """The whole numbers that a config, or a config in it, has under keys that are ``wanted``."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, wanted)
        elif wanted(key):
            values = value if isinstance(value, list) else [value]
            yield from (number for number in values if type(number) is int and number > 0)


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


def is_shared_by_stacks(name: str) -> bool:
    """Whether encoder and decoder have this embedding in common, under a name of its own."""
    return name.endswith("shared.weight")


def shared_with(name: str, config: Mapping[str, Any], names: Collection[str]) -> str | None:
    """What else of the model uses the word embedding ``name``, None if nothing does."""
    if is_shared_by_stacks(name):
        return "the embeddings of encoder and decoder"
    # Stored twice but said to be tied: transformers ties them again.
    if ties_embeddings(config, names) or (True in _stated(config) and _has_head(config)):
        return "the output embedding"
    return None


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """``model_type`` of the model and of the models that it is made of."""
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for part in config.values():
        if isinstance(part, Mapping):
            yield from _model_types(part)


def unreplaceable(config: Mapping[str, Any]) -> str | None:
    """Why libraries that replace exactly ``nn.Linear`` cannot load this model, or None. They would
    leave such layers as they are, some with random weights and no error."""
    if config.get("model_type") == "falcon":
        return "falcon has a linear layer class of its own, which consumers do not replace"
    return None


def is_decoder_only(config: Mapping[str, Any], stacks: Collection[str]) -> bool:
    """Whether config.json names a causal language model with one of ``stacks`` of blocks."""
    architectures = config.get("architectures") or []
    name = architectures[0] if architectures and isinstance(architectures[0], str) else ""
    causal = name.endswith(("ForCausalLM", "LMHeadModel"))
    return causal and not config.get("is_encoder_decoder") and len(stacks) == 1


def initialised_through_weights(config: Mapping[str, Any]) -> str | None:
    """Why a library that hides weights cannot load this model, or None."""
    if config.get("model_type") == "gpt_bigcode":
        return "transformers initialises gpt_bigcode through weights that gptqmodel hides"
    return None
