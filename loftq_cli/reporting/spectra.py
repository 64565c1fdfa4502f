"""Singular values of what a conversion leaves of its worst matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loftq_cli.checkpoint.output import Output
from loftq_cli.layouts.base import matrix_of
from loftq_cli.reporting.recompute import Reread

MATRICES = 6
"""Of how many matrices a report has them."""

_POINTS = 120  # of a curve


def spectra(
    output: Output,
    layers: Sequence[Mapping[str, Any]],
    model: str,
    *,
    offline: bool = False,
) -> list[dict[str, Any]]:
    """Of the worst of ``layers``: ``name``, ``rank``, and ``alone`` and ``final``, the singular
    values of W - quantize(W), or of W - Q if Q was given, and of W - Q - B A relative to the norm
    of W, the largest first, as (number from 1, value), of which the curve needs no more.

    Raises what :func:`~loftq_cli.reporting.recompute.recompute` does.
    """
    names = {layer["name"] for layer in layers}
    reread = Reread(output, model, offline=offline)
    found = []
    for record in output.records:
        if record["name"] not in names:
            continue
        matrix = matrix_of(record)
        weight = reread.weight(matrix)
        norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) or 1.0
        alone = reread.without(record, matrix, weight)
        final = reread.residual(record, matrix, weight)
        found.append(
            {
                "name": record["name"],
                "rank": record["rank"],
                "alone": _curve(alone, norm),
                "final": _curve(final, norm),
            }
        )
    order = [layer["name"] for layer in layers]
    return sorted(found, key=lambda each: order.index(each["name"]))


def singular_values(residual: torch.Tensor) -> torch.Tensor:
    """float64 (shorter side,), the largest first: roots of the eigenvalues of the Gram matrix, in
    float64, which is a square of the shorter side."""
    short = residual if residual.shape[0] <= residual.shape[1] else residual.T
    gram = torch.zeros(len(short), len(short), dtype=torch.float64)
    for start in range(0, short.shape[1], 4096):
        columns = short[:, start : start + 4096].double()
        gram.addmm_(columns, columns.T)
    squares: torch.Tensor = torch.linalg.eigvalsh(gram)
    return squares.clamp(min=0).sqrt().flip(0)


def _curve(residual: torch.Tensor, norm: float) -> list[tuple[int, float]]:
    values = singular_values(residual) / norm
    numbers: Sequence[int] = range(1, len(values) + 1)
    if len(values) > _POINTS:
        numbers = sorted({round(len(values) ** (n / _POINTS)) for n in range(_POINTS + 1)})
    return [(n, float(f"{values[n - 1]:.5g}")) for n in numbers]
