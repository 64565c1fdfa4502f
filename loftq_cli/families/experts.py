"""Mixture-of-experts models: what transformers and PEFT make of the experts.

transformers fuses the experts of a layer into two three-dimensional parameters. PEFT fuses
adapters of single experts likewise: A stacked, B block-diagonal, ``gate_up_proj`` at twice the
rank. It gives all experts of the model one rank, and takes every ``gate_proj``, ``up_proj`` and
``down_proj`` of some families for an expert's (PEFT 0.21, utils/transformers_weight_conversion.py).
In layout ``loftq`` experts stay packed in memory (loading.experts), in ``dense`` they are what the
family has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.errors import UsageError

MISTAKEN = "PEFT takes it for an expert"

_PROJECTION = re.compile(r"\.(?:gate|up|down)_proj\.weight$")
# Experts that were converted, loaded, trained, saved and loaded again, packed; of other families
# they are passed through.
_CONVERTED = (
    *("afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1"),
    *("ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
    *("hunyuan_v1_moe", "mellum", "minimax", "minimax_m2", "mixtral", "olmoe", "qwen3_moe"),
    *("qwen3_next", "solar_open"),
)
# Whose dense and shared layers PEFT mistakes: those it reads adapters of as Qwen-MoE's.
_MISTAKEN = (
    *("afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v32"),
    *("dots1", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite"),
    *("glm_moe_dsa", "glm4v_moe", "longcat_flash", "solar_open"),
    *("mellum", "qwen3_moe", "beam", "qwen3_omni_moe"),
    *("qwen3_omni_moe_thinker", "qwen3_omni_moe_text", "qwen3_next", "hunyuan_v1_moe"),
    *("flex_olmo", "olmoe", "exaone_moe", "cohere2_moe", "laguna", "unlimited_ocr"),
)


FUSED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""The two parameters that transformers makes of the experts of a layer, and the names of the
matrices of an expert that each is made of, in this order, by family."""

_EXPERT = re.compile(r"(.*\.experts)\.(\d+\.\w+)")


def part_of(module: str) -> tuple[str, str] | None:
    """(the module of all experts, what follows it) for the ``module`` of an expert's matrix, None
    if it is none."""
    match = _EXPERT.fullmatch(module)
    return (match[1], match[2]) if match else None


def is_plain(experts: Any) -> bool:
    """Whether a module of fused experts stores and computes y = down(act(gate x) * up x), without
    biases, transposing, interleaving or a norm."""
    odd = ("is_transposed", "has_bias", "has_post_expert_norm")
    plain = ("is_concatenated", "has_gate")
    held = all(getattr(getattr(experts, name, None), "ndim", 0) == 3 for name in FUSED)
    return (
        held
        and not any(getattr(experts, name, False) for name in odd)
        and all(getattr(experts, name, True) for name in plain)
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
            f"--include: {experts[0]} is an expert, and those of {config.get('model_type')} are "
            "not converted yet",
            hint=f"narrow the pattern; converted are those of {', '.join(_CONVERTED)}",
        )
    left = [tensor.name for tensor in kept if is_expert(tensor.name)]
    if left:
        raise UsageError(
            f"{left[0]} is left out, but PEFT adapts all experts or none",
            hint="--include '*.experts.*' selects all of them",
        )


def by_default(tensors: Iterable[StoredTensor], config: Mapping[str, Any], rank: int) -> bool:
    """Whether the experts of a model are converted unless that is told otherwise: PEFT gives all
    of them one ``rank``, which none may be too small for."""
    matrices = [each for each in tensors if is_expert(each.name) and len(each.shape) == 2]
    fits = all(rank <= min(each.shape) for each in matrices)
    return bool(matrices) and fits and config.get("model_type") in _CONVERTED


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
        mistaken_ones = f"{others} layers are passed through: PEFT takes them for experts"
        return mistaken_ones if others else None
    parameters = sum(tensor.elements for tensor in experts)
    more = f", and {others} layers that PEFT takes for experts" if others else ""
    able = config.get("model_type") in _CONVERTED
    how = "; --include '*.experts.*' converts them, in layout loftq or dense" if able else ""
    return (
        f"{len(experts)} tensors of experts with {parameters:,} weights{more} are passed "
        f"through{how}"
    )
