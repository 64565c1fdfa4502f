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
_POWER = 120  # of two, at most: float32 holds it, and what divides by it
_LEAST = 1e-20  # of a sum of squares; beneath it float32 may have lost some of them


@dataclass(frozen=True)
class Split:
    """H = ``rest`` + V S V^T: few directions V (in, k), about the leading eigenvectors, with
    ``inner`` S float32 (k, k), and the rest (in, in) in the dtype to multiply in. ``pieces``
    (2 k, in), in that dtype too, add up to ``directions`` V^T float32 (k, in); ``images`` V^T H,
    like them.

    Inputs of language models have directions with 10^4 times the mean moment. Adapters take them
    first, so that nearly nothing of a residual is left there, and what rounding H to bfloat16 makes
    of that nothing can be more than all the rest.
    """

    pieces: torch.Tensor
    directions: torch.Tensor
    images: torch.Tensor
    inner: torch.Tensor
    rest: torch.Tensor

    def along(self, matrix: torch.Tensor) -> torch.Tensor:
        """M V, float32 (out, k), of floating-point (out, in) M."""
        if matrix.dtype == torch.float32:
            return matrix @ self.directions.T
        both = (self.pieces @ matrix.to(self.pieces.dtype).T).float()
        return (both[: len(self.inner)] + both[len(self.inner) :]).T

    def outer(self, along: torch.Tensor) -> torch.Tensor:
        """tr(M V S V^T M^T) of M V, float64, on its device."""
        return ((along @ self.inner) * along).sum(dtype=torch.float64)

    def times(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows @ H`` of float32 (k, in), float32."""
        along = rows @ self.directions.T
        across = (rows - along @ self.directions).to(self.rest.dtype)  # V^T of it is zero
        return torch.addmm((across @ self.rest.T).float(), along, self.images)

    def apart(self, rows: torch.Tensor, matrix: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
        """``rows @ M^T`` of float32 (r, in), float32; ``matrix`` is M in the dtype to multiply in,
        ``along`` (k, out) the V^T M^T that it had before it was rounded."""
        share = rows @ self.directions.T
        across = (rows - share @ self.directions).to(matrix.dtype)
        return torch.addmm((across @ matrix.T).float(), share, along)


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
        if self.split is not None:
            return self.split.times(rows)
        return (rows.to(self.narrow.dtype) @ self.narrow.T).float()  # as fast as H is read

    def along(self, matrix: torch.Tensor) -> torch.Tensor | None:
        """What ``matrix``, floating-point (out, in), has along the directions that are kept apart,
        float32 (out, few); None if none are."""
        return None if self.split is None else self.split.along(matrix)

    def norm(self, matrix: torch.Tensor, along: torch.Tensor | None = None) -> float:
        """||matrix||_H of a floating-point (out, in). ``along``: as :meth:`along` gives it, of what
        ``matrix`` was before it was rounded."""
        squared = self._squared(matrix, along)
        power = _power(matrix, squared)
        if power:
            squared = self._squared(matrix * 2.0**power, _times(along, power))
        return math.ldexp(math.sqrt(squared * self.unit), -power)

    def norms(
        self,
        matrix: torch.Tensor,
        left: torch.Tensor,
        right: torch.Tensor,
        along: torch.Tensor | None = None,
    ) -> tuple[float, float]:
        """(||matrix||_H, ||matrix + left @ right||_H) of (out, in), (out, r), (r, in), the last
        two float32: the second by thin products alone. ``along`` as for :meth:`norm`."""
        squared, together = self._both_squared(matrix, left, right, along)
        power = _power(matrix, squared + together)
        if power:
            scaled = matrix * 2.0**power, left * 2.0**power, right, _times(along, power)
            squared, together = self._both_squared(*scaled)
        factor = math.ldexp(math.sqrt(self.unit), -power)
        return math.sqrt(squared) * factor, math.sqrt(together) * factor

    def _both_squared(
        self,
        matrix: torch.Tensor,
        left: torch.Tensor,
        right: torch.Tensor,
        along: torch.Tensor | None,
    ) -> tuple[float, float]:
        squared = self._squared(matrix, along)
        weighed = right @ self.moments if self.is_full else right * self.moments
        mixed = self._mixed(matrix, along, weighed)
        twice = 2 * (mixed * left).sum(dtype=torch.float64)
        added = ((left.T @ left) * (weighed @ right.T)).sum(dtype=torch.float64)
        return squared, max(squared + float(twice + added), 0.0)

    def _mixed(
        self, matrix: torch.Tensor, along: torch.Tensor | None, rows: torch.Tensor
    ) -> torch.Tensor:
        """matrix @ rows^T, float32 (out, r), of float32 (r, in)."""
        if self.split is None or along is None:
            return (matrix @ rows.to(matrix.dtype).T).float()
        return self.split.apart(rows, matrix, along.T).T

    def root(self) -> torch.Tensor:
        """S with S S^T = H, float32: its diagonal, or (in, in) by eigendecomposition."""
        if not self.is_full:
            return self.moments.sqrt()
        values, vectors = torch.linalg.eigh(self.moments.double())
        root: torch.Tensor = vectors * values.clamp_min(0).sqrt()
        return root.float()

    def _squared(self, matrix: torch.Tensor, along: torch.Tensor | None) -> float:
        inner = self.narrow
        outer = torch.zeros((), dtype=torch.float64, device=matrix.device)
        if self.split is not None:
            inner = self.split.rest
            outer = self.split.outer(self.split.along(matrix) if along is None else along)
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


def _power(matrix: torch.Tensor, squared: float) -> int:
    """The power of two that brings the values of ``matrix`` near 1, if their sum of squares left
    the range in which float32 adds it up; else 0."""
    if _LEAST < squared < math.inf:
        return 0
    largest = float(matrix.abs().max())
    if not 0 < largest < math.inf:
        return 0
    return max(-_POWER, min(-math.frexp(largest)[1], _POWER))


def _times(along: torch.Tensor | None, power: int) -> torch.Tensor | None:
    return None if along is None else along * 2.0**power


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
    rounded = found.T.to(products)
    pieces = torch.cat([rounded, (found.T - rounded.float()).to(products)])
    directions = pieces[:count].float() + pieces[count:].float()
    images = directions @ moments
    inner = directions @ images.T
    inner = (inner + inner.T) / 2
    rest = torch.addmm(moments, directions.T @ inner, directions, alpha=-1)
    return Split(pieces, directions, images, inner, rest.to(products))
