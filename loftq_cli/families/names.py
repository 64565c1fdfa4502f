"""The same module under its name in a checkpoint and its name in a model.

transformers renames tensors as it loads them: by rules of the family, and between the bare model
(``encoder.layer.0``) and one with a task's head (``bert.encoder.layer.0``). The quantized modules
and the adapter have to follow.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loftq_cli.families.experts import FUSED, part_of


@dataclass(frozen=True)
class Place:
    """Where a tensor of a checkpoint goes: ``name`` in memory. ``computed``: transformers splits
    it, transposes it, or puts it together with others, under that name, by ``operations``, the
    names of their classes."""

    name: str
    operations: tuple[str, ...] | None = None

    @property
    def computed(self) -> bool:
        return self.operations is not None


class Naming:
    """How transformers names the tensors of a checkpoint in ``model``.

    Follows ``convert_and_load_state_dict_in_model`` of transformers 5 (core_model_loading): every
    renaming in turn, then at most one conversion, then the prefix of the bare model is put on or
    taken off.
    """

    def __init__(self, model: Any, present: Collection[str]) -> None:
        """``present``: the names of the model's tensors, or of those that may be asked for."""
        self._present = present
        self._prefix = prefix_of(model)
        self._renamings, self._conversions = transforms(model)

    def place(self, tensor: str) -> Place | None:
        """Where ``tensor`` goes, None if the model has no place for it."""
        key = tensor
        for renaming in self._renamings:
            key, _ = renaming.rename_source_key(key)
        operations = None
        for conversion in self._conversions:
            key, pattern = conversion.rename_source_key(key)
            if pattern is not None:
                operations = tuple(type(each).__name__ for each in conversion.operations)
                break
        for name, made in ((key, operations), (tensor, None)):
            found = self._prefixed(name)
            if found in self._present:
                return Place(found, made)
        return None

    def _prefixed(self, name: str) -> str:
        if not self._prefix:
            return name
        bare = name.removeprefix(f"{self._prefix}.")
        if bare != name and bare in self._present:
            return bare
        longer = f"{self._prefix}.{name}"
        return longer if longer in self._present else name


def transforms(model: Any) -> tuple[list[Any], list[Any]]:
    """(renamings, conversions) of transformers for ``model``."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        transforms = get_model_conversion_mapping(model)
    except (ImportError, AttributeError):  # an older transformers renames nothing
        return [], []
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    return renamings, [item for item in transforms if not isinstance(item, WeightRenaming)]


def places(model: Any, modules: Iterable[str]) -> dict[str, str]:
    """Name in the checkpoint to name in ``model``, for those of ``modules`` that have a weight of
    their own in the model. Modules that are missing from the result have no place in it."""
    naming = Naming(model, {f"{name}.weight" for name, _ in model.named_modules()})
    found = {}
    for module in modules:
        place = naming.place(f"{module}.weight")
        if place is not None and not place.computed:
            found[module] = place.name.removesuffix(".weight")
    return found


def places_of_experts(model: Any, modules: Iterable[str]) -> dict[str, dict[str, str]]:
    """Of each module of fused experts in ``model``, the ``modules``, as a checkpoint names those of
    single experts, by what follows its name (``3.gate_proj``). Those that have no place are left
    out."""
    naming = Naming(model, {f"{name}.{key}" for name, _ in model.named_modules() for key in FUSED})
    found: dict[str, dict[str, str]] = {}
    for module in modules:
        part = part_of(module)
        if part is None:
            continue
        # Of its own on disk, or cut from a stack that has the parameter's name.
        whole = f"{part[0]}.{part[1].partition('.')[2]}"
        place = naming.place(f"{module}.weight") or naming.place(whole)
        if place is not None:
            found.setdefault(place.name.rpartition(".")[0], {})[part[1]] = module
    return found


def places_of_parameters(model: Any, parameters: Iterable[str]) -> dict[str, str | None]:
    """Of ``parameters`` of fused experts, as a class names them, their names in ``model``."""
    naming = Naming(model, {f"{name}.{key}" for name, _ in model.named_modules() for key in FUSED})
    found = {name: naming.place(name) for name in parameters}
    return {name: None if place is None else place.name for name, place in found.items()}


def prefix_of(model: Any) -> str:
    """What precedes the bare model's modules in a model with a head."""
    return str(getattr(model, "base_model_prefix", ""))


def has_other_names(names: Mapping[str, str]) -> bool:
    """Whether some of ``names`` differ by more than a prefix."""
    return any(not _ends(new, old) and not _ends(old, new) for old, new in names.items())


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def key_mapping(names: Mapping[str, str], prefix: str) -> dict[str, str]:
    """``names`` as the regular expressions, and their replacements, that PEFT takes.

    They leave names alone that are the model's already, so that an adapter saved from this model
    loads as well.
    """
    mapping = {}
    if has_other_names(names):
        own = set(names.values())
        mapping = {
            rf"^{re.escape(old)}(?=\.)": new
            for old, new in names.items()
            if old != new and old not in own
        }
    inside = {new.removeprefix(f"{prefix}.").split(".")[0] for new in _under(names, prefix)}
    tops = {name.split(".")[0] for name in names.values()}
    if prefix and inside - tops:
        listed = "|".join(re.escape(top) for top in sorted(inside - tops))
        mapping[rf"^(?=(?:{listed})\.)"] = f"{prefix}."
    if prefix and prefix not in tops:
        mapping[rf"^{re.escape(prefix)}\."] = ""
    return mapping


def _under(names: Mapping[str, str], prefix: str) -> list[str]:
    return [new for new in names.values() if new.startswith(f"{prefix}.")]


def tied(model: Any, modules: Iterable[str]) -> tuple[str, str] | None:
    """(another module of ``model``, the one of ``modules`` that it shares its weight with), None if
    no weight is shared. Modules of other names than the model's are passed over."""
    present = dict(model.named_modules())
    weights = {name: getattr(module, "weight", None) for name, module in present.items()}
    owners = {id(weights[name]): name for name in modules if weights.get(name) is not None}
    for name, weight in weights.items():
        owner = owners.get(id(weight), name)
        if owner != name:
            return name, owner
    return None
