"""The whole model, trained to predict what its original predicts, or to have its hidden states."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from loftq_cli.calibration.text_input import decoder_start
from loftq_cli.errors import UnsupportedInputError
from loftq_cli.refinement.block import token_loss

LIKELIEST = 128
"""How many tokens' probabilities are known of the original; the others are one."""
_LEAST = 1e-6  # of the probability of those others

Hold = Callable[[torch.Tensor], torch.Tensor]


def called(model: Any, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Calls ``model`` with token ids, int64 (windows, length): logits, if it predicts tokens, else
    the last hidden states."""
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
                hint="leave out --end-to-end",
            )
        result: torch.Tensor = found
        return result

    return call


def predicts(model: Any) -> bool:
    """Whether what :func:`called` gives are logits of tokens."""
    return getattr(model, "get_output_embeddings", lambda: None)() is not None


@dataclass(frozen=True)
class Told:
    """What the original says of a window: the logarithms of the LIKELIEST tokens' probabilities
    and their numbers, (length, k), or, without ``tokens``, its hidden states."""

    values: torch.Tensor
    tokens: torch.Tensor | None


@torch.no_grad()
def told(output: torch.Tensor, hold: Hold, *, logits: bool) -> Told:
    """What is kept of an original's ``output``, (length, width), for one window."""
    if not logits:
        return Told(hold(output.float().cpu()), None)
    likelihoods = torch.log_softmax(output.float(), dim=-1)
    values, tokens = likelihoods.topk(min(LIKELIEST, output.shape[-1]), dim=-1)
    return Told(hold(values.cpu()), hold(tokens.int().cpu()))


def distance(output: torch.Tensor, known: Sequence[Told]) -> torch.Tensor:
    """How far ``output``, (windows, length, width), is from what is ``known`` of each window: the
    mean over tokens of KL(original || model), tokens beyond the likeliest taken together, or of
    the error of the hidden states."""
    values = torch.stack([one.values for one in known]).to(output.device)
    if known[0].tokens is None:
        return token_loss(output, values)
    tokens = torch.stack([one.tokens for one in known if one.tokens is not None])
    logits = output.float()
    ours = logits.gather(2, tokens.to(output.device).long()) - torch.logsumexp(
        logits, dim=-1, keepdim=True
    )
    theirs = values.float()
    divergence = (theirs.exp() * (theirs - ours)).sum(dim=-1)
    if values.shape[-1] < output.shape[-1]:
        rest = (1 - theirs.exp().sum(dim=-1)).clamp_min(_LEAST)
        remaining = (1 - ours.exp().sum(dim=-1)).clamp_min(_LEAST)
        divergence = divergence + rest * (rest.log() - remaining.log())
    return divergence.mean()


@contextmanager
def checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Keep no activations inside ``blocks``: they are computed again for the gradient."""
    before = [(block, block.__dict__.get("forward"), block.forward) for block in blocks]
    for block, _, forward in before:
        block.forward = _again(forward)
    try:
        yield
    finally:
        for block, own, _ in before:
            del block.forward
            if own is not None:
                block.__dict__["forward"] = own


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
