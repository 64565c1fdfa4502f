"""How far a model is from another: perplexity, divergence, agreement, and residuals of matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Distance:
    """Over all predicted tokens: ``perplexity`` of the model; ``divergence``, the mean
    KL(reference || model) in nats; ``agreement``, the share of tokens at which both have the same
    most likely one."""

    perplexity: float
    divergence: float
    agreement: float


@torch.inference_mode()
def log_probabilities(model: Any, window: torch.Tensor) -> torch.Tensor:
    """Of every token of int64 (length,) but the first, float32 (length - 1, vocabulary)."""
    logits = model(input_ids=window[None, :-1]).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def distance(
    model: Any, reference: Sequence[torch.Tensor], windows: Iterable[torch.Tensor]
) -> Distance:
    """Of ``model`` from the one whose :func:`log_probabilities` of each window are given."""
    surprise = divergence = 0.0
    agreed = predicted = 0
    for window, theirs in zip(windows, reference, strict=True):
        ours = log_probabilities(model, window)
        surprise -= float(ours.gather(1, window[1:, None]).sum(dtype=torch.float64))
        divergence += float((theirs.exp() * (theirs - ours)).sum(dtype=torch.float64))
        agreed += int((ours.argmax(1) == theirs.argmax(1)).sum())
        predicted += len(ours)
    return Distance(math.exp(surprise / predicted), divergence / predicted, agreed / predicted)


class Originals:
    """The matrices of the original, by module: ``weights`` (out, in), ``moments`` (in, in) of
    their inputs."""

    def __init__(
        self, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor]
    ) -> None:
        self._weights, self._moments = weights, moments
        self._whole = self._norms(weights)

    @torch.inference_mode()
    def residuals(self, model: Any) -> tuple[float, float]:
        """(plain, weighted) relative residual of the modules of ``model``, over all matrices.

        What a module multiplies with, adapter included, is what it makes of the identity.
        """
        errors = {
            name: model.get_submodule(name)(torch.eye(weight.shape[1])).T - weight
            for name, weight in self._weights.items()
        }
        plain, weighted = self._norms(errors)
        return plain / self._whole[0], weighted / self._whole[1]

    def _norms(self, matrices: Mapping[str, torch.Tensor]) -> tuple[float, float]:
        plain = weighted = 0.0
        for name, matrix in matrices.items():
            plain += float(matrix.square().sum(dtype=torch.float64))
            weighted += float((matrix @ self._moments[name] * matrix).sum(dtype=torch.float64))
        return math.sqrt(plain), math.sqrt(weighted)
