"""The whole model, called for what it predicts, or for its hidden states, also with gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from loftq_cli.calibration.text_input import decoder_start
from loftq_cli.errors import UnsupportedInputError


def called(model: Any, device: torch.device, option: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Calls ``model`` with token ids, int64 (windows, length): logits, if it predicts tokens, else
    the last hidden states. It raises UnsupportedInputError if there are neither, which says to
    leave out ``option``."""
    start = None
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        start = decoder_start(model)

    def call(ids: torch.Tensor) -> torch.Tensor:
        inputs = {"input_ids": ids.to(device)}
        if start is not None:
            first = torch.full_like(ids[:, :1], start)
            inputs["decoder_input_ids"] = torch.cat([first, ids[:, :-1]], dim=1).to(device)
        output = model(**inputs)
        found = getattr(output, "logits", None)
        if found is None or found.dim() != 3:
            found = getattr(output, "last_hidden_state", None)
        if found is None:
            raise UnsupportedInputError(
                f"{type(model).__name__} gives neither predictions nor hidden states",
                hint=f"leave out {option}",
            )
        result: torch.Tensor = found
        return result

    return call


def predicts(model: Any) -> bool:
    """Whether what :func:`called` gives are logits of tokens."""
    return getattr(model, "get_output_embeddings", lambda: None)() is not None


@contextmanager
def checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Keep no activations inside ``blocks``: they are computed again for the gradient."""
    with replaced([(block, "forward", _again(block.forward)) for block in blocks]):
        yield


@contextmanager
def replaced(changes: Sequence[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Give modules something of their own in the place of what they, or their class, have under a
    name."""
    before = [(module, name, module.__dict__.get(name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, own in before:
            delattr(module, name)
            if own is not None:
                setattr(module, name, own)


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
