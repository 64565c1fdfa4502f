"""Where transformers keeps the experts of a checkpoint, and which of its tensors hold all experts
of a layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from loftq_cli.checkpoint.stacks import Stack
from loftq_cli.families import adaptable
from loftq_cli.families.experts import form_of, fused_by_peft, is_part
from loftq_cli.families.names import Place

_STACKING = {"MergeModulelist", "Concatenate"}  # of experts' matrices, to one parameter


def homes_of_experts(
    config: Mapping[str, Any],
    tensors: Mapping[str, Sequence[int]],
    places: Mapping[str, Place | None],
    model: nn.Module,
) -> tuple[dict[str, Stack], dict[str, str]]:
    """``stacks`` and ``experts`` of an anatomy: of modules that are whole, if PEFT does not fuse
    their adapters itself."""
    modules = dict(model.named_modules())
    stacks: dict[str, Stack] = {}
    experts: dict[str, str] = {}
    lacking: dict[str, set[str]] = {}
    if fused_by_peft(config):
        return stacks, experts
    for name, shape in tensors.items():
        place = places[name]
        home, _, parameter = ("" if place is None else place.name).rpartition(".")
        form = form_of(modules.get(home))
        if place is None or form is None or parameter not in form.parameters:
            continue
        lacking.setdefault(home, set(form.parameters))
        held, operations = form.parameters[parameter], set(place.operations or ())
        if is_part(name, parameter) and len(shape) == 2 and operations and operations <= _STACKING:
            experts[name] = home
        elif len(shape) == 3 and operations <= {"Transpose"}:
            turned = tuple(shape) != held
            if turned and (not operations or (shape[0], shape[2], shape[1]) != held):
                continue
            above = name.removesuffix(".weight").rpartition(".")[0]
            path = above if above.endswith(".experts") else f"{above}.experts"
            stack = Stack(name, path, parameter, form.count, form.transposed != turned)
            stacks[name] = stack
            experts |= {name: home, **dict.fromkeys(stack.cuts(), home)}
        if name in experts:
            lacking[home].discard(parameter)
    homes = {home for home, parameters in lacking.items() if not parameters}
    homes -= _in_common(model, homes) | _unloadable(model, homes)
    whole = {name: home for name, home in experts.items() if home in homes}
    return {name: stack for name, stack in stacks.items() if name in whole}, whole


def _in_common(model: nn.Module, homes: Collection[str]) -> set[str]:
    """Those of the modules ``homes`` that share parameters with another."""
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    return {home for names in owners.values() if len(names) > 1 for home in names & set(homes)}


def _unloadable(model: nn.Module, homes: Collection[str]) -> set[str]:
    """Those of the modules ``homes`` of fused experts whose adapters PEFT would lose."""
    wrappers = {name: home for home in homes for name in (home, f"{home}.base_layer")}
    return {wrappers[name] for name in adaptable.lost(model, wrappers)}
