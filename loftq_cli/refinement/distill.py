"""The whole model, trained to predict what its original predicts, or to have its hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from loftq_cli.numerics.divergence import divergence
from loftq_cli.refinement.block import token_loss

LIKELIEST = 128
"""How many tokens' probabilities are known of the original; the others are one."""

Hold = Callable[[torch.Tensor], torch.Tensor]


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
    tokens = torch.stack([one.tokens for one in known if one.tokens is not None]).to(output.device)
    return divergence(output.flatten(0, 1), values.flatten(0, 1), tokens.flatten(0, 1))
