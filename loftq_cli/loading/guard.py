"""What PEFT cannot do to a packed layer is refused, with what to do instead; and the layer is told
that it has an adapter.

PEFT adds a merged adapter to ``weight`` in place. On packed codes that is an error about shapes,
or, for some methods, no error and a ruined weight. PEFT asks a layer nothing before it does so; but
it keeps the layer it wraps as ``base_layer``, and torch tells of every submodule it registers.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from loftq_cli.errors import UsageError
from loftq_cli.loading.experts import PackedExperts, hand_over
from loftq_cli.loading.packed_weight import PackedWeight
from loftq_cli.loading.warned import DetachedAdapter, UnsavedEmbeddings

_MERGE = "`loftq merge DIR -o merged --adapter TRAINED`"
# Ways to draw a new adapter that read no base weight.
_FREE_INITIALISATIONS = ("gaussian", "eva", "lora_ga")
# PEFT's wrappers of what is trained in full or by rows, and the setting that asks for each.
_IN_FULL = {
    "ModulesToSaveWrapper": "modules_to_save",
    "TrainableTokensWrapper": "trainable_token_indices",
}


@functools.cache
def install() -> None:
    """Watch for adapters around a :class:`PackedWeight`. Once per process."""
    register_module_module_registration_hook(_on_registration)


def watch(model: nn.Module) -> None:
    """Warn when ``model`` computes for the first time, if packed layers have no adapter by then."""
    model.register_forward_pre_hook(_tell_if_bare)


def _tell_if_bare(model: nn.Module, args: object) -> None:
    if torch.compiler.is_compiling() or model.__dict__.get("_loftq_asked"):
        return
    model.__dict__["_loftq_asked"] = True
    if any(isinstance(part, PackedWeight) and not part.adapted for part in model.modules()):
        warnings.warn(
            "quantized layers compute without the adapter that makes up for their quantization: "
            'attach it with PeftModel.from_pretrained(model, DIR, subfolder="loftq_init"), or '
            "load both with loftq_cli.load(DIR)",
            DetachedAdapter,
            stacklevel=2,
        )


def refuse_to_resize(model: Any) -> None:
    """Have ``resize_token_embeddings`` of ``model`` say why it cannot, if an embedding is
    packed."""
    for find in ("get_input_embeddings", "get_output_embeddings"):
        try:
            embedding = getattr(model, find)()
        except (AttributeError, NotImplementedError):
            continue  # a model without such
        if isinstance(embedding, PackedWeight):
            model.resize_token_embeddings = _refuse_resizing


def tell_of_resizing(model: Any) -> None:
    """Have ``resize_token_embeddings`` of ``model`` warn if PEFT does not notice that it was
    called: it compares the vocabulary that a config has at its top."""
    if not hasattr(model.config, "vocab_size") and "resize_token_embeddings" not in model.__dict__:
        # No method: see _on_registration.
        model.resize_token_embeddings = functools.partial(_resize_aloud, model)


def _resize_aloud(model: Any, *args: Any, **kwargs: Any) -> Any:
    warnings.warn(
        f"PEFT does not notice that embeddings of {type(model).__name__} were resized: save the "
        "adapter with save_pretrained(DIR, save_embedding_layers=True)",
        UnsavedEmbeddings,
        stacklevel=2,
    )
    return type(model).resize_token_embeddings(model, *args, **kwargs)


def _refuse_resizing(*args: Any, **kwargs: Any) -> NoReturn:
    raise UsageError(
        "an embedding that is packed cannot be resized",
        hint="resize the original model and convert that, or convert without --embeddings",
    )


def _on_registration(parent: Any, name: str, child: nn.Module | None) -> None:
    if name == "base_layer" and hasattr(parent, "parameter_name"):
        _on_wrapped(parent, child)
    if not isinstance(child, PackedWeight):
        return
    if setting := _IN_FULL.get(type(parent).__name__):
        raise UsageError(
            f"a weight that is packed cannot be trained itself ({setting})",
            hint="convert with this module left out: --exclude, or without --embeddings",
        )
    if name == "base_layer":
        child.adapted = True
        if hasattr(parent, "merge"):
            parent.merge = _refuse_to_merge
        if hasattr(parent, "update_layer"):
            # No method: pickle looks for a method by its name in the layer, and deepcopy has to
            # bind this to the copy.
            parent.update_layer = functools.partial(_update_layer, parent)


def _refuse_to_merge(*args: Any, **kwargs: Any) -> NoReturn:
    raise UsageError(
        "an adapter cannot be merged into weights that are packed",
        hint=f"save the adapter, then run {_MERGE}",
    )


def _on_wrapped(wrapper: Any, child: Any) -> None:
    """``wrapper`` adapts a parameter of ``child``, perhaps inside another wrapper."""
    while hasattr(child, "parameter_name"):
        child = child.base_layer
    if isinstance(child, PackedExperts):
        hand_over(wrapper)
        wrapper.merge = _refuse_to_merge
        for module in child.modules():
            if isinstance(module, PackedWeight):
                module.adapted = True


def _update_layer(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT's ``update_layer``, which makes a new adapter, if that reads no packed weight."""
    start = getattr(kwargs.get("config"), "init_lora_weights", kwargs.get("init_lora_weights"))
    if isinstance(start, str) and start not in _FREE_INITIALISATIONS:
        raise UsageError(
            f"init_lora_weights={start!r} computes from the base weight, which is packed",
            hint="leave it at True for a further adapter; the LoftQ adapter lies in loftq_init",
        )
    return type(layer).update_layer(layer, *args, **kwargs)
