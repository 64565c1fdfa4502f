"""The divergence of a model's predictions from known ones, and its gradient."""

from __future__ import annotations

from typing import Any

import torch

_LEAST = 1e-6
"""Of the probability of all tokens beyond the known ones."""
_PIECE = 1 << 20
"""Logits that are worked on in float32 at once: of all of them copies would be made, which is most
of the memory if the vocabulary is large."""


def divergence(logits: torch.Tensor, values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The mean over rows of KL(known || softmax(``logits``)) in nats, float32.

    ``logits`` (rows, vocabulary); known are the logarithms ``values`` of the probabilities of
    ``tokens``, both (rows, k); all other tokens count as one. The gradient has the dtype of
    ``logits`` and is computed along with it.
    """
    if not torch.is_grad_enabled():
        logits = logits.detach()
    found: torch.Tensor = _Divergence.apply(logits, values, tokens)  # type: ignore[no-untyped-call]
    return found


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, values: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        rows, size = len(logits), max(1, _PIECE // logits.shape[1])
        found = [
            _piece(
                logits[start : start + size],
                values[start : start + size].float(),
                tokens[start : start + size].long(),
                None if gradient is None else gradient[start : start + size],
                1 / rows,
            )
            for start in range(0, rows, size)
        ]
        ctx.save_for_backward(gradient)
        return torch.cat(found).mean()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None


def _piece(
    logits: torch.Tensor,
    theirs: torch.Tensor,
    tokens: torch.Tensor,
    gradient: torch.Tensor | None,
    share: float,
) -> torch.Tensor:
    """The divergence of every row; ``share`` of its gradient goes to ``gradient``.

    With p known and q the model's, P the sum of p over the known tokens and Q that of q, the
    divergence is sum p log(p / q) + (1 - P) log((1 - P) / (1 - Q)). Its derivative by the logit of
    a known token is q - p, by that of another one q (P - (1 - P) Q / (1 - Q)).
    """
    own = logits.float()
    largest = own.amax(dim=-1, keepdim=True)
    chosen = own.gather(1, tokens) - largest
    powers = (own - largest).exp_()
    total = powers.sum(dim=-1, keepdim=True)
    ours = chosen - total.log()
    p, q = theirs.exp(), ours.exp()
    known = p.sum(dim=-1)
    found = (p * (theirs - ours)).sum(dim=-1)
    inside, outside = known, known
    if theirs.shape[-1] < logits.shape[-1]:
        left = 1 - q.sum(dim=-1)
        rest, remaining = (1 - known).clamp_min(_LEAST), left.clamp_min(_LEAST)
        found = found + rest * (rest.log() - remaining.log())
        free = left > _LEAST
        inside = torch.where(free, known + rest, known)
        outside = torch.where(free, known - rest * (1 - remaining) / remaining, known)
    if gradient is not None:
        powers.mul_((share * outside)[:, None] / total)
        powers.scatter_(1, tokens, share * (q * inside[:, None] - p))
        gradient.copy_(powers)
    return found
