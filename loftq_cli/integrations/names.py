"""The same module under its name in a checkpoint and its name in a model.

A checkpoint of the bare model (``encoder.layer.0``) goes into a task model under that model's
``base_model_prefix`` (``bert.encoder.layer.0``), and the other way round. transformers renames the
weights so; the quantized modules and the adapter have to follow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any


def in_model(
    modules: Iterable[str],
    present: Collection[str],
    prefix: str,
    renamed: Callable[[str], str] = str,
) -> dict[str, str]:
    """Name in the checkpoint to name in the model, for each of ``modules`` that is ``present``.

    ``prefix`` is the model's ``base_model_prefix``; ``renamed`` what :func:`renaming` gives for it.
    Modules that are missing from the result have no place in the model.
    """
    found = {}
    for name in modules:
        stripped = [name.removeprefix(f"{prefix}.")] if name.startswith(f"{prefix}.") else []
        others = [renamed(candidate) for candidate in (*stripped, f"{prefix}.{name}", name)]
        candidates = [*stripped, f"{prefix}.{name}", name, *others]
        match = next((candidate for candidate in candidates if candidate in present), None)
        if match is not None:
            found[name] = match
    return found


def renaming(model: Any) -> Callable[[str], str]:
    """How transformers renames a module of a checkpoint to that of ``model``: some families have
    other names in memory than on disk (ViT, transformers 5)."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping

        transforms = [
            transform
            for transform in get_model_conversion_mapping(model)
            if type(transform).__name__ == "WeightRenaming"  # others put weights together
        ]
    except (ImportError, AttributeError):  # an older transformers renames nothing
        return str

    def renamed(module: str) -> str:
        key = f"{module}.weight"
        for transform in transforms:
            key, _ = transform.rename_source_key(key)
        return str(key.removesuffix(".weight"))

    return renamed


class RenamedModules(UserWarning):
    """The adapter has names of layers that PEFT does not find in the model."""


def has_other_names(names: Mapping[str, str]) -> bool:
    """Whether some of ``names`` differ by more than a prefix."""
    return any(not new.endswith(old) and not old.endswith(new) for old, new in names.items())


def key_mapping(names: Mapping[str, str], prefix: str) -> dict[str, str]:
    """``names`` as the regular expressions, and their replacements, that PEFT takes.

    They leave names alone that are the model's already, so that an adapter saved from this model
    loads as well.
    """
    if has_other_names(names):
        return {rf"^{re.escape(old)}(?=\.)": new for old, new in names.items()}
    added = {old.split(".")[0] for old, new in names.items() if new == f"{prefix}.{old}"}
    removed = any(old == f"{prefix}.{new}" for old, new in names.items())
    mapping = {}
    if added:
        tops = "|".join(re.escape(top) for top in sorted(added))
        mapping[rf"^(?=(?:{tops})\.)"] = f"{prefix}."
    if removed:
        mapping[rf"^{re.escape(prefix)}\."] = ""
    return mapping


def tied(model: Any, modules: Iterable[str]) -> tuple[str, str] | None:
    """(another module of ``model``, the one of ``modules`` that it shares its weight with), None
    where no weight is shared. Modules of other names than the model's are passed over."""
    present = dict(model.named_modules())
    weights = {name: getattr(module, "weight", None) for name, module in present.items()}
    owners = {id(weights[name]): name for name in modules if weights.get(name) is not None}
    for name, weight in weights.items():
        owner = owners.get(id(weight), name)
        if owner != name:
            return name, owner
    return None
