"""Scales of columns and rows that lie between a matrix and a quantization of it.

    Q = diag(a) W diag(c) + noise,  a (out,), c (in,) by least squares

AWQ (arXiv:2306.00978, section 3.2) and SmoothQuant (arXiv:2211.10438, equation 3) multiply columns
before they quantize and divide what is in front of the layer by the same s: the norm, or the rows
of another matrix. What they chose is not in the checkpoint, but in its values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

_NOISE = 0.5
"""The share of a column's energy that may be noise: with more, nothing is known of its scale."""
_CLEAR = 0.2
"""The share with which rounding does not change a scale by itself: few values become zero."""
# What a quantizer does to scales by itself, by clipping and by centroids, as the least allowed:
_MIDDLE = 0.3
"""All of them together, as a logarithm."""
_SPREAD = 0.05
"""Their deviation from that."""
_FURTHEST = 0.4
"""One of them."""
_ALIKE = 0.5
"""The least correlation of scales that are one another's counterpart."""
_FEWEST = 8


@dataclass(frozen=True)
class Scales:
    """``values`` (n,) float64, their relative standard ``errors``, infinite where nothing is known,
    and the ``shares`` of what they were fitted to that are noise. ``noise``: that of all,
    ||Q - diag(a) W diag(c)||^2 / ||Q||^2, None if Q is zero."""

    values: torch.Tensor
    errors: torch.Tensor
    shares: torch.Tensor
    noise: float | None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def known(self) -> torch.Tensor:
        return self.errors.isfinite()

    def last(self, count: int) -> Scales:
        """The last ``count`` of them."""
        values, errors, shares = (e[-count:] for e in (self.values, self.errors, self.shares))
        return Scales(values, errors, shares, self.noise)

    def over(self, other: torch.Tensor) -> Scales:
        """These, divided by ``other`` (n,)."""
        return replace(self, values=self.values / other)

    def told(self) -> str | None:
        """What quantization alone does not explain of them, in few words; None if it explains
        all."""
        known = self.known
        if self.noise is None:
            return None
        if 8 * int(known.sum()) < len(self):
            return "by what is not to be told from noise"
        logs, errors = self.values[known].log(), self.errors[known]
        # The weights themselves are off by this share: less in a scale is no more harm than that.
        rounding, estimate = math.sqrt(self.noise), 5 * _mean_square(errors)
        middle = float(logs.median())
        if abs(middle) > max(_MIDDLE, 2 * self.noise, estimate):
            return f"by {math.exp(middle):.3g}"
        furthest = torch.clamp(10 * errors, min=max(_FURTHEST, 2 * rounding))
        off = ((logs - middle).exp() - 1).abs() - furthest
        off[self.shares[known] > max(_CLEAR, 1.5 * self.noise)] = 0
        if float(off.max()) > 0:
            number = int(known.nonzero()[off.argmax()])
            return f"number {number} by {float(self.values[number]):.3g}"
        spread = _mean_square(logs - middle)
        if spread > max(_SPREAD, 0.75 * rounding, estimate):
            return f"by {math.exp(-spread):.3g} to {math.exp(spread):.3g}"
        return None


def fit(
    weight: torch.Tensor, quantized: torch.Tensor, columns: torch.Tensor | None = None
) -> tuple[Scales, Scales]:
    """(c, a): the scales of the columns and rows of ``quantized`` Q, of ``weight`` W (out, in),
    float32; both are overwritten. Raises nothing: what is noise has an infinite error.

    With ``columns`` (in,) those of Q are W's times these already, and c is what is left. The
    product of c and a is divided between them so that the median of a is 1 or, with ``columns``,
    as the rows have it.
    """
    if columns is not None:
        weight.mul_(columns.float())
    energies = quantized.square()
    mixed = quantized.mul_(weight)
    squares = weight.square_()
    # Rounding errs in proportion to a row's scale: each row counts alike.
    own = squares.sum(0, dtype=torch.float64).cpu()
    a = torch.ones(len(weight), dtype=torch.float64)
    c = torch.ones(weight.shape[1], dtype=torch.float64)
    for _ in range(2):
        if columns is None:
            c = _ratio(_times(mixed.T, 1 / a), own)
        a = _ratio(_times(mixed, c), _times(squares, c.square()))
        a[a <= 0] = 1.0  # of nothing but noise
    if columns is None:
        a /= a.median()
    cross = _times(mixed.T, 1 / a)
    c = _ratio(cross, own)
    of_columns = _errors(c, cross, own, _times(energies.T, a.pow(-2)), len(a))
    cross, own = _times(mixed, c), _times(squares, c.square())
    energy = _times(energies, torch.ones_like(c))
    of_rows = _errors(a, cross, own, energy, len(c))
    whole = float(energy.sum())
    left = whole - float((2 * a * cross - a.square() * own).sum())
    noise = max(left, 0.0) / whole if whole else None
    return Scales(c, *of_columns, noise), Scales(a, *of_rows, noise)


def counterpart(columns: Scales, rows: Scales) -> tuple[float, Scales] | None:
    """(how alike, s) if the ``columns`` of a matrix were multiplied by s and the ``rows`` of
    the one in front of it divided by s; None if that is not to be seen. Each is an estimate of its
    own: s is the mean of both, weighted by what is known of them."""
    both = columns.known & rows.known
    if int(both.sum()) < _FEWEST:
        return None
    up, down = columns.values[both].log(), -rows.values[both].log()
    if _mean_square(up) < 3 * _mean_square(columns.errors[both]):
        return None
    # Where a quantizer makes everything smaller the two differ by a constant.
    alike = max(_cosine(up, down), _cosine(up - up.mean(), down - down.mean()))
    if alike < _ALIKE:
        return None
    of_columns, of_rows = columns.errors.pow(-2), rows.errors.pow(-2)
    total = of_columns + of_rows
    logs = of_columns * columns.values.log().nan_to_num(0.0, 0.0, 0.0)
    logs -= of_rows * rows.values.log().nan_to_num(0.0, 0.0, 0.0)
    middle = float(((up + down) / 2).median())
    s = torch.where(total > 0, logs / total, torch.tensor(middle)).exp()
    return alike, replace(columns, values=s, errors=total.rsqrt())


def _times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return (matrix @ vector.to(matrix)).double().cpu()


def _ratio(cross: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """cross / own, 1 where there is nothing."""
    return torch.where(own > 0, cross / own.clamp_min(1e-300), torch.ones_like(own))


def _errors(
    values: torch.Tensor,
    cross: torch.Tensor,
    own: torch.Tensor,
    energy: torch.Tensor,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The relative standard error of each of ``values``, each fitted to ``count`` weights, and the
    share of their energy that is noise."""
    energy = energy.cpu()
    left = (energy - 2 * values * cross + values.square() * own).clamp_min(0)
    unknown = (own <= 0) | (values <= 0) | (left > _NOISE * energy) | (energy <= 0)
    error = (left / max(count - 1, 1) / own.clamp_min(1e-300)).sqrt() / values.abs()
    # No estimate is better than the arithmetic.
    error = torch.where(unknown, torch.tensor(math.inf, dtype=error.dtype), error.clamp_min(1e-6))
    return error, torch.where(energy > 0, left / energy.clamp_min(1e-300), torch.ones_like(left))


def _mean_square(values: torch.Tensor) -> float:
    return math.sqrt(float(values.square().mean()))


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    norms = float(one.norm() * other.norm())
    return float(one @ other) / norms if norms else 0.0
