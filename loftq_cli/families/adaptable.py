"""What PEFT makes of a model, and of the names of its adapter's tensors, as PEFT itself tells.

PEFT renames an adapter's tensors as transformers renames those of a checkpoint, although they are
named as modules are in memory. Where a rule of the family fits such a name too, the tensor gets
one that no module has, and is passed over.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

LOST = "PEFT renames the tensors of its adapter, and loses them"
_PREFIX = "base_model.model."


def lost(model: nn.Module, modules: Collection[str]) -> set[str]:
    """Those of ``modules`` of ``model`` whose adapter PEFT would not load; none if PEFT is not
    installed, or renames nothing in models of this type."""
    try:
        if not modules or not _is_renamed(model):
            return set()
        peft: Any = importlib.import_module("peft")
        conversion: Any = importlib.import_module("peft.utils.transformers_weight_conversion")
        rename = conversion.convert_peft_adapter_state_dict_for_transformers
    except (ImportError, AttributeError):  # other versions rename nothing
        return set()
    names = {
        f"{_PREFIX}{module}.lora_{side}.weight": module
        for module in sorted(modules)
        for side in "AB"
    }
    stored = {name: torch.full((1, 1), float(number)) for number, name in enumerate(names)}
    loaded = rename(model, peft.LoraConfig(), dict(stored))
    return {
        module
        for name, module in names.items()
        if name not in loaded or not torch.equal(loaded[name], stored[name])
    }


def _is_renamed(model: Any) -> bool:
    mapping: Any = importlib.import_module("transformers.conversion_mapping")
    kind = getattr(model.config, "model_type", None)
    return mapping.get_checkpoint_conversion_mapping(kind) is not None


def unadaptable(model: Any) -> str | None:
    """Why PEFT attaches no adapter to ``model`` at all, or None: it looks for what is tied to the
    input embedding, unless config.json says that nothing is."""
    if getattr(model.config, "tie_word_embeddings", None) is False:
        return None
    if isinstance(getattr(model, "_tied_weights_keys", None), dict):
        try:
            model.get_input_embeddings()
        except NotImplementedError:
            return (
                f"PEFT attaches no adapter to {type(model).__name__}: transformers does not say "
                "which module is its input embedding"
            )
    return None
