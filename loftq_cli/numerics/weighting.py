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

from loftq_cli.numerics import native_form
from loftq_cli.numerics.metrics import squared_norm

_CHUNK_ELEMENTS = 1 << 21  # few enough that scratch memory is reused, not mapped anew
_GPU_CHUNK_ELEMENTS = 1 << 26
_BLOCK = 512  # columns of H at a time
_DIRECTIONS = 8  # kept apart


@dataclass(frozen=True)
class Split:
    """H = ``rest`` + V S V^T: few directions V (in, k), about the leading eigenvectors, with
    ``inner`` S float32 (k, k), and the rest (in, in) in the dtype to multiply in. ``pieces``
    (2 k, in), in that dtype too, are V^T rounded and what rounding took.

    Inputs of language models have directions with 10^4 times the mean moment. Adapters take them
    first, so that nearly nothing of a residual is left there, and what rounding H to bfloat16 makes
    of that nothing can be more than all the rest.
    """

    pieces: torch.Tensor
    inner: torch.Tensor
    rest: torch.Tensor

    def outer(self, matrix: torch.Tensor) -> torch.Tensor:
        """tr(M V S V^T M^T) of (out, in) M, float64, on its device."""
        both = (self.pieces @ matrix.to(self.pieces.dtype).T).float()
        along = both[: len(self.inner)] + both[len(self.inner) :]
        return ((self.inner @ along) * along).sum(dtype=torch.float64)


@dataclass(frozen=True)
class Weighting:
    """H of a matrix with ``in`` columns.

    ``moments`` float32, (in,) the diagonal or (in, in) symmetric, divided by ``unit`` so that the
    diagonal's mean is 1: see :func:`make_weighting`. ``narrow``: the full H in the dtype to
    multiply in (the same tensor if that is float32). ``split``: for norms, if it is not.
    """

    moments: torch.Tensor
    unit: float
    narrow: torch.Tensor = field(repr=False)
    split: Split | None = field(default=None, repr=False)

    @property
    def is_full(self) -> bool:
        return self.moments.dim() == 2

    def times(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows @ H`` of float32 (k, in), float32."""
        if not self.is_full:
            return rows * self.moments
        return (rows.to(self.narrow.dtype) @ self.narrow.T).float()  # as fast as H is read

    def norm(self, matrix: torch.Tensor) -> float:
        """||matrix||_H of a floating-point (out, in)."""
        return math.sqrt(self._squared(matrix) * self.unit)

    def norms(
        self, matrix: torch.Tensor, left: torch.Tensor, right: torch.Tensor
    ) -> tuple[float, float]:
        """(||matrix||_H, ||matrix + left @ right||_H) of (out, in), (out, r), (r, in), the last
        two float32: the second by thin products alone."""
        squared = self._squared(matrix)
        weighed = right @ self.moments if self.is_full else right * self.moments
        mixed = (matrix @ weighed.to(matrix.dtype).T).float()
        twice = 2 * (mixed * left).sum(dtype=torch.float64)
        added = ((left.T @ left) * (weighed @ right.T)).sum(dtype=torch.float64)
        together = max(squared + float(twice + added), 0.0)
        return math.sqrt(squared * self.unit), math.sqrt(together * self.unit)

    def root(self) -> torch.Tensor:
        """S with S S^T = H, float32: its diagonal, or (in, in) by eigendecomposition."""
        if not self.is_full:
            return self.moments.sqrt()
        values, vectors = torch.linalg.eigh(self.moments.double())
        root: torch.Tensor = vectors * values.clamp_min(0).sqrt()
        return root.float()

    def _squared(self, matrix: torch.Tensor) -> float:
        inner = self.narrow if self.split is None else self.split.rest
        nothing = torch.zeros((), dtype=torch.float64, device=matrix.device)
        outer = nothing if self.split is None else self.split.outer(matrix)
        if native_form.can_run(inner):
            form = native_form.quadratic_form(matrix.to(inner.dtype), inner)
            return max(float(outer) + form, 0.0)
        limit = _GPU_CHUNK_ELEMENTS if matrix.is_cuda else _CHUNK_ELEMENTS
        step = max(limit // matrix.shape[1], 1)
        starts = range(0, matrix.shape[0], step)
        rows = (matrix[start : start + step] for start in starts)
        if not self.is_full:
            root = self.moments.sqrt()
            return math.fsum(squared_norm(part.float() * root) for part in rows)
        sums = torch.stack([outer, *(self._squared_rows(part, inner) for part in rows)])
        found: list[float] = sums.tolist()  # at once: a device is waited for each time
        return max(found[0] + math.fsum(found[1:]), 0.0)

    @staticmethod
    def _squared_rows(rows: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        """tr(rows inner rows^T), float64, on their device, which need not be waited for."""
        doubled = rows.to(inner.dtype, copy=True)
        # H is symmetric: what is above the diagonal counts twice.
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        for start in range(0, rows.shape[1], _BLOCK):
            stop = min(start + _BLOCK, rows.shape[1])
            # Its columns are its rows, which CPU libraries read faster.
            image = (doubled[:, :stop] @ inner[start:stop, :stop].T).float()
            total += image.mul_(doubled[:, start:stop]).sum(dtype=torch.float64)
            doubled[:, start:stop].mul_(2)
        return total


def make_weighting(moments: torch.Tensor, products: torch.dtype) -> Weighting:
    """The weighting by float32 second moments, (in,) or (in, in), finite and not all zero.

    ``products``: the dtype that thin products are to run in. Takes ``moments`` over.
    """
    diagonal = moments if moments.dim() == 1 else moments.diagonal()
    unit = float(diagonal.double().mean())
    moments.div_(unit)
    if moments.dim() == 1 or products == torch.float32:
        return Weighting(moments, unit, moments)
    return Weighting(moments, unit, moments.to(products), _split(moments, products))


def _split(moments: torch.Tensor, products: torch.dtype) -> Split:
    """By three steps of orthogonal iteration: directions that stand out are found by one."""
    generator = torch.Generator().manual_seed(0)
    count = min(_DIRECTIONS, len(moments))
    found = torch.randn((len(moments), count), generator=generator).to(moments.device)
    for _ in range(3):
        found = torch.linalg.qr(moments @ found).Q
    inner = found.T @ (moments @ found)
    inner = (inner + inner.T) / 2
    rest = torch.addmm(moments, found @ inner, found.T, alpha=-1)
    rounded = found.T.to(products)
    pieces = torch.cat([rounded, (found.T - rounded.float()).to(products)])
    return Split(pieces, inner, rest.to(products))
