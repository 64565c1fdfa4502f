"""Every class of transformers' language models, made small from its own config."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.whole.zoo.own_settings import OWN
from tests.whole.zoo.settings import COUNTS, DERIVED, WIDTHS

MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
MOST = 40_000_000
"""Parameters: what is larger than that was not made small."""

_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_OWN_HEADS = ("qk_nope_head_dim",)  # latent attention: as many keys as queries


def config_of(kind: str) -> Any:
    """The config of model type ``kind``, made small."""
    made = CONFIG_MAPPING[kind]
    try:
        plain = made()
    except Exception:  # of any kind: it has no defaults that fit each other
        return made(**OWN[kind])
    settings = _shrunk(plain.to_dict())
    with contextlib.suppress(Exception):
        return made(**settings)
    for key, value in settings.items():  # that the constructor does not take together
        with contextlib.suppress(Exception):
            setattr(plain, key, value)
    return plain


def _shrunk(held: dict[str, Any]) -> dict[str, Any]:
    """What to set of a config that holds ``held``."""
    own = OWN.get(held.get("model_type", ""), {})
    settings: dict[str, Any] = {}
    for key, value in {**WIDTHS, **COUNTS}.items():
        if type(held.get(key)) in (int, float):
            settings[key] = value
    settings |= {key: value for key, value in DERIVED.items() if held.get(key, 0) is None}
    if any(key in held for key in _OWN_HEADS):
        settings["num_key_value_heads"] = 4
        settings.pop("head_dim", None)
        settings["qk_head_dim"] = COUNTS["qk_rope_head_dim"] + COUNTS["qk_nope_head_dim"]
        if held.get("head_dim", 0) == held.get("qk_rope_head_dim"):
            settings["head_dim"] = COUNTS["qk_rope_head_dim"]
    settings |= _lists(held)
    for key in ("rope_parameters", "rope_scaling"):
        rope = held.get(key)
        if isinstance(rope, dict) and "mrope_section" in rope:
            settings[key] = {**rope, "mrope_section": [2, 3, 3]}  # half of a head
    if "rotary_dim" in held:
        settings["rotary_dim"] = 8
    for key, inner in held.items():
        if key != "per_layer_config" and isinstance(inner, dict) and "model_type" in inner:
            kept = {name: value for name, value in inner.items() if name != "per_layer_config"}
            settings[key] = {**kept, **_shrunk(inner)}
    return {**settings, **own}


def _lists(held: dict[str, Any]) -> dict[str, Any]:
    """Of what there is an entry a layer, two that differ."""
    count = next((held[key] for key in _LAYERS if key in held), None)
    lists = {key: value for key, value in held.items() if isinstance(value, list)}
    per_layer = {key: value for key, value in lists.items() if len(value) == count}
    kinds = per_layer.get("layer_types") or next(iter(per_layer.values()), [])
    first = len({str(kind) for kind in kinds[:2]}) == 2
    return {key: value[:2] if first else value[-2:] for key, value in per_layer.items()}


def build(kind: str, name: str) -> Any:
    """The class ``name`` for model type ``kind``, small, with random weights. Raises ValueError if
    it is too large still."""
    config = config_of(kind)
    found = getattr(transformers, name)
    if not isinstance(config, found.config_class):
        text = config.get_text_config(decoder=True)
        config = text if isinstance(text, found.config_class) else config
    for key, value in OWN.get(name, {}).items():
        setattr(config, key, value)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in found(config).parameters())
    if size > MOST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    model = found(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            zero = parameter.ndim > 1 and not bool(parameter.any())
            if zero or not bool(torch.isfinite(parameter).all()):
                parameter.normal_(std=0.05)
    return model
