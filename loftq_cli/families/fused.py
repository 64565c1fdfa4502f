"""Linear layers that servers fuse into one: vLLM's and SGLang's packed_modules_mapping."""

from __future__ import annotations

from collections.abc import Iterable

_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
)


def fused_parts(names: Iterable[str]) -> list[list[str]]:
    """The ``names`` of weights that become one matrix there, together; alone, none is listed."""
    found: dict[tuple[str, int], list[str]] = {}
    for name in names:
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        for number, leaves in enumerate(_TOGETHER):
            if leaf in leaves:
                found.setdefault((parent, number), []).append(name)
    return [parts for parts in found.values() if len(parts) > 1]
