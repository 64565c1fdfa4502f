"""Every class of transformers' language models, made small from its own config."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
VOCABULARY = 128
MOST = 40_000_000
"""Parameters: what is larger than that was not made small."""

_WIDTHS = {
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "embed_dim": 64,
    "dim": 64,
    "emb_dim": 64,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "projection_dim": 64,
    "out_hidden_size": 64,
    "text_hidden_size": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "d_ff": 96,
    "n_inner": 96,
    "mlp_dim": 96,
    "ffn_hidden_size": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
}
_COUNTS = {
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "depth": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "d_kv": 16,
    "kv_channels": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "image_size": 32,
    "patch_size": 16,
    "initializer_range": 0.1,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 16,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
}
_LISTS = ("layer_types", "mlp_layer_types")
_OWN_HEADS = ("qk_nope_head_dim",)  # latent attention: as many keys as queries


def config_of(kind: str) -> Any:
    """The config of model type ``kind``, made small."""
    made = CONFIG_MAPPING[kind]
    plain = made()
    settings = _shrunk(plain)
    with contextlib.suppress(Exception):
        return made(**settings)
    for key, value in settings.items():  # that the constructor does not take together
        with contextlib.suppress(Exception):
            setattr(plain, key, value)
    return plain


def _shrunk(config: Any) -> dict[str, Any]:
    held = config.to_dict()
    settings: dict[str, Any] = {}
    for key, value in {**_WIDTHS, **_COUNTS}.items():
        if type(held.get(key)) in (int, float):
            settings[key] = value
    if any(key in held for key in _OWN_HEADS):
        settings["num_key_value_heads"] = 4
        settings.pop("head_dim", None)
    for key in _LISTS:
        if isinstance(held.get(key), list):
            settings[key] = held[key][-2:] if len(set(held[key][:2])) < 2 else held[key][:2]
    for key in ("rope_parameters", "rope_scaling"):
        rope = held.get(key)
        if isinstance(rope, dict) and "mrope_section" in rope:
            settings[key] = {**rope, "mrope_section": [2, 3, 3]}  # half of a head
    if "rotary_dim" in held:
        settings["rotary_dim"] = 8
    for key in held:
        inner = getattr(config, key, None)
        if key.endswith("config") and hasattr(inner, "to_dict"):
            made = {**inner.to_dict(), **_shrunk(inner)}
            try:
                settings[key] = type(inner)(**made)
            except Exception:  # of any kind: as a dictionary, then
                settings[key] = made
    return settings


def build(kind: str, name: str) -> Any:
    """The class ``name`` for model type ``kind``, small, with random weights. Raises ValueError if
    it is too large still."""
    config = config_of(kind)
    found = getattr(transformers, name)
    if name.endswith("ForCausalLM") and not hasattr(config, "vocab_size"):
        config = config.get_text_config()
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in found(config).parameters())
    if size > MOST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    model = found(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(torch.isfinite(parameter).all()):
                parameter.normal_(std=0.05)
    return model
