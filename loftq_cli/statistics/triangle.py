"""A full matrix of second moments in a quarter of its bytes.

    H = V^T V + D C D

with few directions V (k, in), which take what stands out of the spectrum, and D the square roots
of the diagonal that remains, both in float32. C has ones on its diagonal and nothing above one
beside it: of these, correlations but for what V took, one triangle is kept, in 32767ths.

V = S^(-1/2) Y^T H, with S = Y^T H Y and Y near the leading eigenvectors, is the Nyström
approximation: what it leaves of a positive semidefinite H is so as well, whatever Y is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DIRECTIONS = 8
"""Directions that are kept apart, at most."""

_STEPS = 32767
_ROWS = 256  # worked on at once
_LOST = 1e-7  # of the largest direction: what is below is rounding


@dataclass(frozen=True)
class Triangle:
    """``diagonal`` float32 (in,), that of D C D; ``directions`` V float32 (k, in), k at most
    DIRECTIONS; ``correlations`` int16: C below its diagonal, row by row, ``in * (in - 1) / 2``
    values, and a zero behind them if that is odd."""

    diagonal: torch.Tensor
    directions: torch.Tensor
    correlations: torch.Tensor


def length(width: int) -> int:
    """Correlations of so many inputs: an even number, so that what is stored behind them begins at
    a multiple of four bytes."""
    return -(-width * (width - 1) // 4) * 2


def pack(moments: torch.Tensor) -> Triangle:
    """Of float32 (in, in), finite and symmetric, on any device; all of it on the CPU. The diagonal
    of what it stands for is that of ``moments`` to the last bits."""
    size = len(moments)
    directions = _directions(moments)
    own = directions.square().sum(dim=0)
    diagonal = (moments.diagonal() - own).clamp_min_(0)
    root = diagonal.sqrt()
    inverse = torch.where(root > 0, root.reciprocal(), torch.zeros_like(root))
    correlations = torch.zeros(length(size), dtype=torch.int16)
    place = 0
    for start in range(0, size, _ROWS):
        stop = min(start + _ROWS, size)
        rest = moments[start:stop, :stop] - directions[:, start:stop].T @ directions[:, :stop]
        rest *= inverse[start:stop, None] * _STEPS
        rest *= inverse[:stop]
        steps = rest.round_().clamp_(-_STEPS, _STEPS).to(torch.int16).cpu()
        for row in range(start, stop):
            correlations[place : place + row] = steps[row - start, :row]
            place += row
    return Triangle(diagonal.cpu(), directions.cpu(), correlations)


def unpack(triangle: Triangle) -> torch.Tensor:
    """H, float32 (in, in), exactly symmetric."""
    size = len(triangle.diagonal)
    root, directions = triangle.diagonal.sqrt(), triangle.directions
    moments = torch.empty((size, size))
    place = 0
    for start in range(0, size, _ROWS):
        stop = min(start + _ROWS, size)
        rows = torch.zeros((stop - start, stop))
        for row in range(start, stop):
            rows[row - start, :row] = triangle.correlations[place : place + row]
            place += row
        rows *= root[start:stop, None] / _STEPS
        rows *= root[:stop]
        corner = rows[:, start:]
        corner += corner.T.clone()
        corner.diagonal().copy_(triangle.diagonal[start:stop])
        shared = directions[:, start:stop].T @ directions[:, :stop]
        rows[:, :start] += shared[:, :start]
        corner += (shared[:, start:] + shared[:, start:].T) / 2
        moments[start:stop, :stop] = rows
        moments[:start, start:stop] = rows[:, :start].T
    return moments


def _directions(moments: torch.Tensor) -> torch.Tensor:
    """V, by three steps of orthogonal iteration: directions that stand out are found by one."""
    count = min(DIRECTIONS, len(moments))
    generator = torch.Generator().manual_seed(0)
    found = torch.randn((len(moments), count), generator=generator).to(moments.device)
    for _ in range(3):
        found = torch.linalg.qr(moments @ found).Q
    images = (found.T @ moments).double()
    inner = images @ found.double()
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    kept = values > _LOST * values[-1].clamp_min(torch.finfo(torch.float32).tiny)
    turned = vectors[:, kept] / values[kept].sqrt()
    directions: torch.Tensor = (turned.T @ images).float()
    return directions
