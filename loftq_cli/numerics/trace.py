"""The norms of an alternation's residuals, as its steps find them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from loftq_cli.numerics.decomposition import Norms
from loftq_cli.numerics.sweep import Product
from loftq_cli.numerics.weighting import Weighting

_SAMPLED = 512
"""Rows that the weighted norm of a step in the middle is estimated from, at least; all of a matrix
with less than twice as many."""


@dataclass
class Trace:
    """Norms as they are found."""

    weight: float
    quantized: float = 0.0
    steps: list[float] = field(default_factory=list)

    def norms(self, step: int) -> Norms:
        """With iterate ``step`` kept."""
        final = self.steps[step - 1] if step else self.quantized
        return Norms(self.weight, self.quantized, self.steps, final)


class WeightedTrace(Trace):
    """Norms in ||.||_H, found from the residual that a sweep leaves.

    That of the first step is exact. Of tall matrices the later ones are estimated, unless they are
    asked for as they are: from every so many rows, by what these had of the first step's norm.
    """

    def __init__(self, weighting: Weighting, weight: torch.Tensor) -> None:
        super().__init__(weighting.norm(weight))
        self._weighting = weighting
        self._seen = False  # what quantization alone leaves
        # The diagonal's norm costs little, and of few rows an estimate is poor.
        self._stride = max(len(weight) // _SAMPLED, 1) if weighting.is_full else 1
        self._of_all = 1.0  # the first step's norm, divided by that of the sampled rows
        self._estimated: set[int] = set()

    def is_estimated(self, step: int) -> bool:
        """Whether the norm of ``step`` is an estimate."""
        return step in self._estimated

    def correct(self, step: int, norm: float) -> None:
        """The exact ``norm`` of ``step``, in the place of what was seen."""
        self.steps[step - 1] = norm
        self._estimated.discard(step)

    def see_quantized(self, residual: torch.Tensor) -> None:
        self.quantized = self._weighting.norm(residual)
        self._seen = True

    def see_step(
        self,
        remains: torch.Tensor | None,
        product: Product,
        along: torch.Tensor | None,
        *,
        exact: bool = False,
    ) -> None:
        """``remains`` = R - product; ``along``: what R has along the directions that the weighting
        keeps apart. If nothing was seen before, R is W - quantize(W)."""
        assert remains is not None
        along = along_remains(self._weighting, along, product)
        first = not self.steps
        if self._seen and not (first or exact) and self._stride > 1:
            self.steps.append(self._of_all * self._sampled(remains, along))
            self._estimated.add(len(self.steps))
            return
        if self._seen:
            self.steps.append(self._weighting.norm(remains, along))
        else:
            left, right = product.left, product.right
            adapted, self.quantized = self._weighting.norms(remains, left, right, along)
            self.steps.append(adapted)
            self._seen = True
        if first and self._stride > 1:
            self._of_all = self.steps[0] / (self._sampled(remains, along) or 1.0)

    def _sampled(self, remains: torch.Tensor, along: torch.Tensor | None) -> float:
        """The norm of every so many rows."""
        chosen = slice(None, None, self._stride)
        return self._weighting.norm(remains[chosen], None if along is None else along[chosen])


def along_remains(
    weighting: Weighting, along: torch.Tensor | None, product: Product
) -> torch.Tensor | None:
    """Of R - product, from what R has along the directions kept apart."""
    of_product = weighting.along(product.right)
    if along is None or of_product is None:
        return None
    return torch.addmm(along, product.left, of_product, alpha=-1)
