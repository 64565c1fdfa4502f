"""What PEFT makes of a model, and of the names of its adapter's tensors.

PEFT renames an adapter's tensors as transformers renames those of a checkpoint, although they are
named as modules are in memory. Where a rule of the family fits such a name too, the tensor gets
one that no module has, and is passed over. PEFT is not asked: importing it takes seconds.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from loftq_cli.families.names import transforms

LOST = "PEFT renames the tensors of its adapter, and loses them"


def lost(model: nn.Module, modules: Collection[str]) -> set[str]:
    """Those of ``modules`` of ``model``, none of experts, whose adapter PEFT would not load.

    Follows ``convert_peft_adapter_state_dict_for_transformers`` of PEFT 0.21: every renaming in
    turn, unless that took off no more than what a name begins with. Conversions fit experts alone.
    """
    if not _is_renamed(model):
        return set()
    renamings, _ = transforms(model)
    found = set()
    for module in sorted(modules):
        for side in "AB":
            name = key = f"{module}.lora_{side}.default.weight"
            for renaming in renamings:
                key, _ = renaming.rename_source_key(key)
            if not f"base_model.model.{name}".endswith(key):
                found.add(module)
    return found


def _is_renamed(model: Any) -> bool:
    """Whether PEFT renames anything in models of this type."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # an older transformers
        return False
    kind = getattr(model.config, "model_type", None)
    return get_checkpoint_conversion_mapping(kind) is not None


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
