"""The same module under its name in a checkpoint and its name in a model.

A checkpoint of the bare model (``encoder.layer.0``) goes into a task model under that model's
``base_model_prefix`` (``bert.encoder.layer.0``), and the other way round. transformers renames the
weights so; the quantized modules and the adapter have to follow.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping


def in_model(modules: Iterable[str], present: Collection[str], prefix: str) -> dict[str, str]:
    """Name in the checkpoint to name in the model, for each of ``modules`` that is ``present``.

    ``prefix`` is the model's ``base_model_prefix``. Modules that are missing from the result have
    no place in the model.
    """
    found = {}
    for name in modules:
        stripped = [name.removeprefix(f"{prefix}.")] if name.startswith(f"{prefix}.") else []
        candidates = [*stripped, f"{prefix}.{name}", name]
        match = next((candidate for candidate in candidates if candidate in present), None)
        if match is not None:
            found[name] = match
    return found


def key_mapping(names: Mapping[str, str], prefix: str) -> dict[str, str]:
    """``names`` as the regular expressions, and their replacements, that PEFT takes.

    They leave names alone that are the model's already, so that an adapter saved from this model
    loads as well.
    """
    added = {old.split(".")[0] for old, new in names.items() if new == f"{prefix}.{old}"}
    removed = any(old == f"{prefix}.{new}" for old, new in names.items())
    mapping = {}
    if added:
        tops = "|".join(re.escape(top) for top in sorted(added))
        mapping[rf"^(?=(?:{tops})\.)"] = f"{prefix}."
    if removed:
        mapping[rf"^{re.escape(prefix)}\."] = ""
    return mapping
