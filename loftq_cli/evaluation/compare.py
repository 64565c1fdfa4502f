"""How near the distributions, or the hidden states, of two models are on a window of text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

_ROWS = 256  # tokens whose distributions are compared at once


@dataclass
class Predictions:
    """Of a causal language model, over windows: each token is predicted from those before it.
    ``kl`` and ``agreeing`` compare with the original, if there is one."""

    tokens: int = 0
    surprise: float = 0.0
    source_surprise: float = 0.0
    kl: float = 0.0
    agreeing: int = 0

    def add(
        self, ids: torch.Tensor, logits: torch.Tensor, source: torch.Tensor | None = None
    ) -> None:
        """A window: ``ids`` int64 (length,), ``logits`` and ``source``'s (length, vocabulary), of
        any floating dtype; computed in float32, added up in float64."""
        targets = ids[1:].to(logits.device)
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, start + _ROWS)
            picked = targets[rows, None]
            ours = torch.log_softmax(logits[:-1][rows].float(), dim=-1)
            self.surprise -= float(ours.gather(1, picked).double().sum())
            if source is not None:
                theirs = torch.log_softmax(source[:-1][rows].float(), dim=-1).to(ours.device)
                self.source_surprise -= float(theirs.gather(1, picked).double().sum())
                self.kl += float((theirs.exp() * (theirs - ours)).double().sum())
                self.agreeing += int((theirs.argmax(1) == ours.argmax(1)).sum())
        self.tokens += len(targets)

    @property
    def perplexity(self) -> float:
        return _exp(self.surprise / self.tokens)

    @property
    def source_perplexity(self) -> float:
        return _exp(self.source_surprise / self.tokens)


@dataclass
class States:
    """Of the last hidden states, over windows: the mean cosine of a token's, and the relative
    error, ||ours - theirs|| / ||theirs|| over all."""

    tokens: int = 0
    cosines: float = 0.0
    _squares: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def add(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """A window: both (length, width), of any floating dtype."""
        ours, theirs = ours.double(), theirs.to(ours.device).double()
        self.cosines += float(torch.cosine_similarity(ours, theirs, dim=1).sum())
        self._squares[0] += float((ours - theirs).square().sum())
        self._squares[1] += float(theirs.square().sum())
        self.tokens += len(ours)

    @property
    def cosine(self) -> float:
        return self.cosines / self.tokens

    @property
    def relative_error(self) -> float:
        return math.sqrt(self._squares[0] / self._squares[1]) if self._squares[1] else 0.0


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
