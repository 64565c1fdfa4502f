"""The second moments of a layer's input, H = E[x x^T], and the norm that they define.

    ||M||_H^2 = tr(M H M^T) = E ||M x||^2

so the weighted residual ||W - Q - B A||_H is the root mean square error of the layer's output, per
token. ``H`` is kept whole or as its diagonal alone; either may be singular: nothing here inverts or
factorises it, except for the exact SVD.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from loftq_cli.numerics.metrics import squared_norm

_CHUNK_ELEMENTS = 1 << 21
_BLOCK = 1024  # columns of H at a time


@dataclass(frozen=True)
class Weighting:
    """H of a matrix with ``in`` columns.

    ``moments`` float32, (in,) the diagonal or (in, in) symmetric, divided by ``unit`` so that the
    diagonal's mean is 1: see :func:`make_weighting`. ``wide``: the full H in the dtype to multiply
    in (the same tensor where that is float32).
    """

    moments: torch.Tensor
    unit: float
    wide: torch.Tensor = field(repr=False)

    @property
    def is_full(self) -> bool:
        return self.moments.dim() == 2

    def times(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows @ H`` of float32 (k, in), float32."""
        if not self.is_full:
            return rows * self.moments
        return (rows.to(self.wide.dtype) @ self.wide).float()

    def norm(
        self,
        matrix: torch.Tensor,
        left: torch.Tensor | None = None,
        right: torch.Tensor | None = None,
    ) -> float:
        """||matrix - left @ right||_H of (out, in), (out, r), (r, in); the last two float32."""
        step = max(_CHUNK_ELEMENTS // matrix.shape[1], 1)
        total = 0.0
        for start in range(0, matrix.shape[0], step):
            rows = matrix[start : start + step].float()
            if left is not None and right is not None:
                rows = rows - left[start : start + step] @ right
            total += self._squared(rows)
        return math.sqrt(max(total, 0.0) * self.unit)

    def root(self) -> torch.Tensor:
        """S with S S^T = H, float32: its diagonal, or (in, in) by eigendecomposition."""
        if not self.is_full:
            return self.moments.sqrt()
        values, vectors = torch.linalg.eigh(self.moments.double())
        root: torch.Tensor = vectors * values.clamp_min(0).sqrt()
        return root.float()

    def _squared(self, rows: torch.Tensor) -> float:
        if not self.is_full:
            return squared_norm(rows * self.moments.sqrt())
        # H is symmetric: what is above the diagonal counts twice.
        wide = rows.to(self.wide.dtype)
        total = 0.0
        for start in range(0, rows.shape[1], _BLOCK):
            stop = start + _BLOCK
            block = wide[:, start:stop] @ self.wide[start:stop, start:stop]
            if start:
                block = torch.addmm(block, wide[:, :start], self.wide[:start, start:stop], alpha=2)
            total += float((block.float() * rows[:, start:stop]).sum(dtype=torch.float64))
        return total


def make_weighting(moments: torch.Tensor, products: torch.dtype) -> Weighting:
    """The weighting by float32 second moments, (in,) or (in, in), finite and not all zero.

    ``products``: the dtype that thin products are to run in. Takes ``moments`` over.
    """
    diagonal = moments if moments.dim() == 1 else moments.diagonal()
    unit = float(diagonal.double().mean())
    moments.div_(unit)
    wide = moments if moments.dim() == 1 else moments.to(products)
    return Weighting(moments, unit, wide)
