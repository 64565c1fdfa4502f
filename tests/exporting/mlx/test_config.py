"""Rotary settings as published files have them, after transformers has written them its own way."""

from __future__ import annotations

from copy import deepcopy

import pytest
from transformers import AutoConfig

from loftq_cli.exporting.mlx.config import with_rotary_settings

LLAMA3 = {
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
PUBLISHED = [
    ("llama", LLAMA3),
    ("qwen2", {"rope_theta": 1000000.0}),
    ("glm", {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    ("gemma3_text", {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0}),
]


@pytest.mark.parametrize(("kind", "published"), PUBLISHED, ids=[kind for kind, _ in PUBLISHED])
def test_what_was_published_is_there_again(kind, published):
    written = AutoConfig.for_model(kind, **deepcopy(published)).to_dict()
    assert not published.items() <= written.items(), "transformers writes it as published: no need"
    found = with_rotary_settings(written)
    assert found["rope_theta"] == published["rope_theta"]
    assert found.get("rope_local_base_freq") == published.get("rope_local_base_freq")
    assert found.get("partial_rotary_factor") == published.get("partial_rotary_factor")
    scaling = published.get("rope_scaling")
    assert scaling is None or scaling.items() <= found["rope_scaling"].items()
    assert scaling is not None or not found.get("rope_scaling")
    assert found["rope_parameters"] == written["rope_parameters"]


def test_a_published_config_stays():
    published = {"model_type": "llama", **LLAMA3, "hidden_size": 64, "rope_parameters": None}
    assert with_rotary_settings(published) == published
    both = {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 8.0}}
    assert with_rotary_settings(both) == both


def test_parts_of_a_model_have_their_own():
    part = {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}
    assert with_rotary_settings({"text_config": part}) == {
        "text_config": {**part, "rope_theta": 5.0}
    }
