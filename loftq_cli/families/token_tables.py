"""The input and output embedding of a model's class, as the class itself tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loftq_cli.families.skeleton import skeleton


@dataclass(frozen=True)
class TokenTables:
    """Names of tensors that have an entry per token, the first the module's own and then those that
    are the same tensor: the input and the output embedding (tokens, dim), and the bias (tokens,) of
    the output. ``tied``: whether both embeddings are one."""

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    tied: bool = False

    def renamed(self, name_of: Callable[[str], str]) -> TokenTables:
        """The same with ``name_of`` each name."""
        inputs, outputs, biases = (
            tuple(dict.fromkeys(map(name_of, names)))
            for names in (self.inputs, self.outputs, self.biases)
        )
        return TokenTables(inputs, outputs, biases, self.tied)


def token_tables(config: Mapping[str, Any]) -> TokenTables | None:
    """Those of the class of ``config``, the content of a config.json, named as in memory; None if
    transformers is missing, does not know the class, or cannot build it."""
    model = skeleton(config)
    if isinstance(model, str):
        return None
    source, head = input_embeddings(model), _asked(model, "get_output_embeddings")
    first, second = getattr(source, "weight", None), getattr(head, "weight", None)
    outputs, inputs = _names(model, head, second), _names(model, source, first)
    tied = first is not None and first is second
    if tied:  # each name is of the module that the tensor is asked from
        own = outputs[:1]
        outputs, inputs = own, tuple(name for name in inputs if name not in own)
    return TokenTables(inputs, outputs, _names(model, head, getattr(head, "bias", None)), tied)


def input_embeddings(model: Any) -> Any:
    """The module that turns tokens into vectors; None if the model has none, or several."""
    return _asked(model, "get_input_embeddings")


def _asked(model: Any, method: str) -> Any:
    try:
        return getattr(model, method)()
    except (AttributeError, NotImplementedError):  # transformers' way to say that there is none
        return None


def _names(model: nn.Module, owner: object, tensor: torch.Tensor | None) -> tuple[str, ...]:
    """All names of ``tensor``, that which it has as a part of ``owner`` first."""
    if tensor is None:
        return ()
    owners = {name for name, module in model.named_modules() if module is owner}
    found = [n for n, t in model.named_parameters(remove_duplicate=False) if t is tensor]
    return tuple(sorted(found, key=lambda name: name.rpartition(".")[0] not in owners))
