"""A class that is a part of a checkpoint's model: the text part of one for images and text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from loftq_cli.families.blocks import is_in_block, stack_of
from loftq_cli.families.modules import kind_of


def left_out(model: Any, modules: Collection[str], found: Mapping[str, str]) -> set[str]:
    """Those of ``modules``, named as in a checkpoint, that ``model`` is no part of: they lie in
    stacks of blocks of which it has nothing. ``found``: the names in the model of those that it
    has. None, if the model has a stack of its own that nothing of the checkpoint goes to."""
    held = {stack_of(f"{name}.") for name in found}
    lacking = {name for name in modules if name not in found}
    whole = {name for name in lacking if is_in_block(f"{name}.")}
    whole = {name for name in whole if stack_of(f"{name}.") not in held}
    filled = {stack_of(f"{name}.") for name in found.values()}
    own = {
        stack_of(f"{name}.")
        for name, module in model.named_modules()
        if kind_of(module) == "linear" and is_in_block(f"{name}.")
    }
    return whole if whole and own <= filled else set()


def config_for(chosen: Any, config: Any) -> Any:
    """The part of ``config``, a transformers configuration, that the class ``chosen`` is for, with
    how the whole is quantized; None if that is the whole, or ``chosen`` is an auto class."""
    wanted = getattr(chosen, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return None
    part = config.get_text_config()
    if not isinstance(part, wanted):
        return None
    if (stated := getattr(config, "quantization_config", None)) is not None:
        part.quantization_config = stated
    return part
