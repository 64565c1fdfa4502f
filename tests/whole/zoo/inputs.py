"""What the classes of the zoo take: text, and beside it what some cannot do without."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from tests.whole.zoo.settings import IMAGE_TOKEN

TOKENS = (torch.arange(22).view(2, 11) * 7 + 3) % 90 + 10
SIDE = 32
"""Of images, in pixels."""

_DRAWN = torch.Generator().manual_seed(0)
_IMAGES = torch.randn(2, 3, SIDE, SIDE, generator=_DRAWN)
_SOUND = torch.randn(2, 128, 88, generator=_DRAWN)
_PLACES = torch.full((2, 4), IMAGE_TOKEN)
_WITH_IMAGE = torch.cat([_PLACES, TOKENS], dim=1)
_START = TOKENS[:, :5]


def inputs(model: Any) -> dict[str, Any]:
    """For two sequences of eleven tokens."""
    kind = model.config.model_type
    taken = inspect.signature(model.forward).parameters
    found: dict[str, Any] = {"input_ids": TOKENS}
    if "use_cache" in taken or hasattr(model, "peft_config"):
        found["use_cache"] = False
    if model.config.is_encoder_decoder:
        found["decoder_input_ids"] = _START
    return {**found, **_MORE.get(kind, dict)()} if kind in _MORE else found


def _idefics() -> dict[str, Any]:
    return {
        "pixel_values": _IMAGES[:, None],
        "image_attention_mask": torch.ones(2, TOKENS.shape[1], 1, dtype=torch.long),
    }


def _kosmos_2() -> dict[str, Any]:
    places = torch.zeros(2, 15, dtype=torch.long)
    places[:, :4] = 1
    return {
        "input_ids": _WITH_IMAGE,
        "pixel_values": _IMAGES,
        "image_embeds_position_mask": places,
    }


def _pi0() -> dict[str, Any]:
    return {
        "input_ids": _WITH_IMAGE,
        "pixel_values": _IMAGES[:, None],
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
        "state": torch.ones(2, 32),
        "noise": torch.ones(2, 4, 32),
        "timestep": torch.full((2,), 0.5),
    }


_MORE: dict[str, Callable[[], dict[str, Any]]] = {
    "blip": lambda: {"pixel_values": _IMAGES},
    "blip-2": lambda: {"pixel_values": _IMAGES, "input_ids": _WITH_IMAGE},
    "diffusion_gemma": lambda: {"decoder_input_ids": _START},
    "idefics": _idefics,
    "instructblip": lambda: {
        "pixel_values": _IMAGES,
        "input_ids": _WITH_IMAGE,
        "qformer_input_ids": TOKENS,
    },
    "instructblipvideo": lambda: {
        "pixel_values": _IMAGES[:, None],
        "input_ids": _WITH_IMAGE,
        "qformer_input_ids": TOKENS,
    },
    "kosmos-2": _kosmos_2,
    "molmo2": lambda: {"mm_token_type_ids": torch.zeros_like(TOKENS)},
    "musicgen_decoder": lambda: {"input_ids": TOKENS.repeat(4, 1)},
    "musicgen_melody_decoder": lambda: {"input_ids": TOKENS.repeat(4, 1)},
    "pi0": _pi0,
    "pix2struct": lambda: {
        "input_ids": None,
        "flattened_patches": torch.ones(2, 4, 50),
        "decoder_input_ids": _START,
    },
    "pp_formulanet": lambda: {"input_ids": None, "pixel_values": _IMAGES},
    "udop": lambda: {"bbox": torch.ones(2, 11, 4)},
    "vision-encoder-decoder": lambda: {"input_ids": None, "pixel_values": _IMAGES},
    "voxtral_realtime": lambda: {"input_features": _SOUND},
}
