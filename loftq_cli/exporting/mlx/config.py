"""Rotary settings where mlx-lm looks for them.

transformers 5 writes them as ``rope_parameters``, one set or one for each kind of attention. Files
published before have them at the top of the config, and mlx-lm (0.32) reads only those for most
families: without them it would take its own defaults, and compute something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KINDS = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
"""Where the base of each kind of attention was published, in Gemma 3's config for one."""


def with_rotary_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config``, a model's, with ``rope_theta``, ``rope_scaling`` and their like at the top as
    well, in the configs of parts (``text_config``) too. What is there already stays."""
    parts = {
        key: with_rotary_settings(value)
        for key, value in config.items()
        if key.endswith("_config") and isinstance(value, Mapping)
    }
    given = config.get("rope_parameters")
    found: dict[str, Any] = {}
    if isinstance(given, Mapping):
        for kind, name in _KINDS.items():
            if isinstance(given.get(kind), Mapping):
                found |= _settings(given[kind], name)
        if not found:
            found = _settings(given, "rope_theta")
    present = {key: value for key, value in config.items() if value is not None}
    return {**config, **found, **present, **parts}


def _settings(parameters: Mapping[str, Any], base: str) -> dict[str, Any]:
    scaling = dict(parameters)
    found = {base: scaling.pop("rope_theta", None)}
    found["partial_rotary_factor"] = scaling.pop("partial_rotary_factor", None)
    if base == "rope_theta" and scaling.get("rope_type", "default") != "default":
        found["rope_scaling"] = scaling
    return {key: value for key, value in found.items() if value is not None}
