"""Mixture-of-experts models: what transformers and PEFT make of the experts.

transformers fuses the experts of a layer into two three-dimensional parameters. PEFT fuses
adapters of single experts likewise: A stacked, B block-diagonal, ``gate_up_proj`` at twice the
rank. It adds them to dense parameters only, all experts of the model at one rank, and takes every
``gate_proj``, ``up_proj`` and ``down_proj`` of some families for an expert's (PEFT 0.21,
utils/transformers_weight_conversion.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.errors import UsageError

MISTAKEN = "PEFT takes it for an expert"

_PROJECTION = re.compile(r"\.(?:gate|up|down)_proj\.weight$")
# Experts that were converted, loaded and trained; of other families they are passed through.
_CONVERTED = ("mixtral", "qwen3_moe")
# Whose dense and shared layers PEFT mistakes: those it reads adapters of as Qwen-MoE's.
_MISTAKEN = (
    *("afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v32"),
    *("dots1", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite"),
    *("glm_moe_dsa", "glm4v_moe", "longcat_flash", "solar_open"),
    *("mellum", "qwen3_moe", "beam", "qwen3_omni_moe"),
    *("qwen3_omni_moe_thinker", "qwen3_omni_moe_text", "qwen3_next", "hunyuan_v1_moe"),
    *("flex_olmo", "olmoe", "exaone_moe", "cohere2_moe"),
)


def is_expert(name: str) -> bool:
    """Whether a tensor or module is of one of the experts that a layer chooses from."""
    return ".experts." in f".{name}"


def mistaken(name: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT would lose an adapter of this layer, which is no expert, among the experts'."""
    named = bool(_PROJECTION.search(name)) and not is_expert(name)
    return named and config.get("model_type") in _MISTAKEN


def check(matrices: Iterable[str], kept: Iterable[StoredTensor], config: Mapping[str, Any]) -> None:
    """Raise UsageError if selected experts, or what is mistaken for them, would not load."""
    selected = list(matrices)
    for name in selected:
        if mistaken(name, config):
            raise UsageError(f"--include: {name}: {MISTAKEN}", hint="narrow the pattern")
    experts = [name for name in selected if is_expert(name)]
    if not experts:
        return
    if config.get("model_type") not in _CONVERTED:
        raise UsageError(
            f"--include: {experts[0]} is an expert, which is converted for "
            f"{' and '.join(_CONVERTED)} only",
            hint="narrow the pattern",
        )
    left = [tensor.name for tensor in kept if is_expert(tensor.name)]
    if left:
        raise UsageError(
            f"{left[0]} is left out, but PEFT adapts all experts or none",
            hint="--include '*.experts.*' selects all of them",
        )


def check_ranks(ranks: Mapping[str, int], rank: int) -> None:
    """Raise UsageError if an expert's rank is not ``rank``, that of the whole conversion."""
    for name, own in ranks.items():
        if is_expert(name) and own != rank:
            raise UsageError(
                f"{name} has rank {own}, but PEFT gives all experts --rank {rank}",
                hint="use one rank, no larger than the smallest side of an expert's matrix",
            )


def note(kept: Iterable[tuple[StoredTensor, str]], config: Mapping[str, Any]) -> str | None:
    """One line about the experts that are passed through and their share, None without any."""
    tensors = list(kept)
    experts = [tensor for tensor, _ in tensors if is_expert(tensor.name)]
    others = sum(reason == MISTAKEN for _, reason in tensors)
    if not experts:
        return None
    parameters = sum(tensor.elements for tensor in experts)
    more = f", and {others} layers that PEFT takes for experts" if others else ""
    able = config.get("model_type") in _CONVERTED
    how = "; --include '*.experts.*' converts them, in layout dense" if able and not others else ""
    return (
        f"{len(experts)} tensors of experts with {parameters:,} weights{more} are passed through: "
        f"no consumer adapts them packed{how}"
    )
