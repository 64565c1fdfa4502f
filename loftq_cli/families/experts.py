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
from dataclasses import dataclass
from typing import Any

from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.errors import CorruptFileError, UsageError

MISTAKEN = "PEFT takes it for an expert"

_PROJECTION = re.compile(r"\.(?:gate|up|down)_proj\.weight$")
# Whose experts PEFT (0.21) fuses itself, from adapters of single ones.
_FUSED_BY_PEFT = (
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
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("gate_up_proj",)),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}
"""The parameters that transformers makes of the experts of a layer, and the names of the matrices
of an expert that each is made of, in this order, by family. The down's comes last."""

_EXPERT = re.compile(r"(.*\.experts)\.(\d+\.\w+)")
# That transformers does not describe by attributes: all experts see all tokens, zeros among them.
_BATCHED = ("Llama4TextExperts",)


def part_of(module: str) -> tuple[str, str] | None:
    """(the module of all experts, what follows it) for the ``module`` of an expert's matrix, None
    if it is none."""
    match = _EXPERT.fullmatch(module)
    return (match[1], match[2]) if match else None


def is_part(name: str, parameter: str) -> bool:
    """Whether the tensor ``name`` is called as a matrix of one expert is that ``parameter`` is made
    of."""
    part = part_of(name.removesuffix(".weight"))
    leaf = part[1].partition(".")[2] if part else ""
    return any(leaf in leaves for leaves in FUSED[parameter])


@dataclass(frozen=True)
class Form:
    """How a module of fused experts stores and computes: ``parameters``, of FUSED, by name with
    their shapes, the down's last; ``transposed``: (experts, in, out) instead of (experts, out, in);
    ``gated``: the first gives a gate and what it is for; ``biased``: a bias after each.
    ``batched``: it is given the tokens of all experts, one expert's after the other's."""

    parameters: Mapping[str, tuple[int, ...]]
    transposed: bool
    gated: bool
    biased: bool
    batched: bool

    @property
    def count(self) -> int:
        """The experts."""
        return self.parameters["down_proj"][0]


def form_of(module: Any) -> Form | None:
    """The form of a module of fused experts, None if it is none, or computes what nobody here
    knows. transformers describes most of them by attributes (``use_experts_implementation``)."""
    held = {
        name: tuple(parameter.shape)
        for name, parameter in getattr(module, "_parameters", {}).items()
        if parameter is not None and not name.endswith("_bias")
    }
    gated = "gate_up_proj" in held
    first = "gate_up_proj" if gated else "up_proj"
    batched = type(module).__name__ in _BATCHED
    described = getattr(module, "has_gate", None) is gated
    if held.keys() != {first, "down_proj"} or not (batched or described):
        return None
    ups, downs = held[first], held["down_proj"]
    if getattr(module, "has_post_expert_norm", False) or not len(ups) == len(downs) == 3:
        return None
    sides = 2 if gated else 1
    plain = (ups[0], downs[2] * sides, downs[1])
    turned = (ups[0], downs[2], downs[1] * sides)
    if ups[0] != downs[0] or ups not in (plain, turned):
        return None
    transposed = bool(getattr(module, "is_transposed", ups != plain))
    if ups != (turned if transposed else plain):
        return None
    parameters = {first: ups, "down_proj": downs}
    return Form(parameters, transposed, gated, bool(getattr(module, "has_bias", False)), batched)


def is_expert(name: str) -> bool:
    """Whether a tensor or module is of one of the experts that a layer chooses from."""
    return ".experts." in f".{name}"


def mistaken(name: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT would lose an adapter of this layer, which is no expert, among the experts'."""
    named = bool(_PROJECTION.search(name)) and not is_expert(name)
    return named and config.get("model_type") in _MISTAKEN


def check(
    matrices: Iterable[str],
    kept: Iterable[StoredTensor],
    config: Mapping[str, Any],
    homes: Mapping[str, str],
) -> None:
    """Raise UsageError if selected experts, or what is mistaken for them, would not load; ``homes``
    as in :func:`able`."""
    selected = list(matrices)
    for name in selected:
        if mistaken(name, config):
            raise UsageError(f"--include: {name}: {MISTAKEN}", hint="narrow the pattern")
    experts = [name for name in selected if is_expert(name)]
    if not experts:
        return
    homeless = [name for name in experts if name not in homes]
    if homeless and not fused_by_peft(config):
        raise UsageError(
            f"--include: {homeless[0]} is an expert, and those of {config.get('model_type')} "
            "cannot be converted",
            hint="narrow the pattern; docs/mixture-of-experts.md says which can be",
        )
    left = [tensor.name for tensor in kept if _is_weight(tensor)]
    if left:
        raise UsageError(
            f"{left[0]} is left out, but PEFT adapts all experts or none",
            hint="--include '*.experts.*' selects all of them",
        )


def _is_weight(tensor: StoredTensor) -> bool:
    return is_expert(tensor.name) and tensor.name.endswith(".weight")


def fused_by_peft(config: Mapping[str, Any]) -> bool:
    """Whether PEFT fuses adapters of single experts of such a model."""
    return config.get("model_type") in _FUSED_BY_PEFT


def _is_stack(tensor: StoredTensor, homes: Mapping[str, str]) -> bool:
    """Whether this is of all experts of a layer: by its place, or by its name and shape."""
    return len(tensor.shape) == 3 and (tensor.name in homes or is_expert(tensor.name))


def able(
    tensors: Iterable[StoredTensor], config: Mapping[str, Any], homes: Mapping[str, str]
) -> bool:
    """Whether the experts among ``tensors`` can be converted; ``homes``: where transformers keeps
    those that it fuses, and whose adapters PEFT does not fuse, by the name of a matrix."""
    names = [tensor.name for tensor in tensors if _is_weight(tensor)]
    return bool(names) and (fused_by_peft(config) or all(name in homes for name in names))


def by_default(
    tensors: Iterable[StoredTensor],
    config: Mapping[str, Any],
    rank: int,
    homes: Mapping[str, str],
) -> bool:
    """Whether the experts of a model are converted unless that is told otherwise: PEFT gives all
    of them one ``rank``, which none may be too small for."""
    held = [tensor for tensor in tensors if _is_weight(tensor)]
    return able(held, config, homes) and all(rank <= min(each.shape) for each in held)


def check_whole(tensors: Iterable[StoredTensor]) -> None:
    """Raise CorruptFileError if a layer lacks a matrix of one of its experts, or if these differ in
    shape."""
    found: dict[tuple[str, str], dict[int, StoredTensor]] = {}
    for tensor in tensors:
        part = part_of(tensor.name.removesuffix(".weight")) if _is_weight(tensor) else None
        if part is not None:
            number, _, leaf = part[1].partition(".")
            found.setdefault((part[0], leaf), {})[int(number)] = tensor
    counts: dict[str, int] = {}
    for (layer, _), held in found.items():
        counts[layer] = max(counts.get(layer, 0), max(held) + 1)
    for (layer, leaf), held in found.items():
        count = counts[layer]
        missing = next((number for number in range(count) if number not in held), None)
        if missing is not None:
            raise CorruptFileError(
                f"tensor '{layer}.{missing}.{leaf}.weight' is missing, of {count} experts",
                hint="download the checkpoint again",
            )
        first, *others = held.values()
        odd = next((each for each in others if each.shape != first.shape), None)
        if odd is not None:
            raise CorruptFileError(
                f"tensor {odd.name!r} is {list(odd.shape)}, {first.name!r} {list(first.shape)}: "
                "experts of a layer have one shape",
                hint="--exclude '*.experts.*' leaves them as they are",
            )


def check_ranks(ranks: Mapping[str, int], rank: int) -> None:
    """Raise UsageError if an expert's rank is not ``rank``, that of the whole conversion."""
    for name, own in ranks.items():
        if is_expert(name) and own != rank:
            raise UsageError(
                f"{name} has rank {own}, but PEFT gives all experts --rank {rank}",
                hint="use one rank, no larger than the smallest side of an expert's matrix",
            )


def note(
    kept: Iterable[tuple[StoredTensor, str]],
    config: Mapping[str, Any],
    homes: Mapping[str, str] = {},
) -> str | None:
    """One line about the experts that are passed through and their share, None without any;
    ``homes``: as in :func:`able`, stacks too."""
    tensors = list(kept)
    experts = [each for each, _ in tensors if _is_weight(each) or _is_stack(each, homes)]
    others = sum(reason == MISTAKEN for _, reason in tensors)
    if not experts:
        mistaken_ones = f"{others} layers are passed through: PEFT takes them for experts"
        return mistaken_ones if others else None
    parameters = sum(tensor.elements for tensor in experts)
    more = f", and {others} layers that PEFT takes for experts" if others else ""
    stacked = any(_is_stack(each, homes) for each in experts)
    convertible = any(each.name in homes for each in experts) or able(experts, config, homes)
    layouts = "layout loftq" if stacked else "layout loftq or dense"
    how = f"; --include '*.experts.*' converts them, in {layouts}" if convertible else ""
    return (
        f"{len(experts)} tensors of experts with {parameters:,} weights{more} are passed "
        f"through{how}"
    )
