"""Packed moments: what is lost, against float64, and the values by their definition."""

from __future__ import annotations

import pytest
import torch

from loftq_cli.statistics.triangle import DIRECTIONS, Triangle, length, pack, unpack
from tests.support.quantizing import gaussian


def moments(width: int, times: float = 0.0, tokens: int = 900) -> torch.Tensor:
    """Of inputs with a mean so many times their spread, massive channels and one never used."""
    inputs = gaussian(tokens, width, seed=1) + times * gaussian(width, seed=2)
    inputs[:, :2] *= 200
    inputs[:, -1] = 0
    return (inputs.double().T @ inputs.double() / tokens).float()


@pytest.mark.parametrize("width", [3, 40, 256, 300, 513])
@pytest.mark.parametrize("times", [0, 10, 1000])
def test_little_is_lost(width, times):
    H = moments(width, times)
    before = H.clone()
    packed = pack(H)
    found = unpack(packed)
    assert torch.equal(H, before)
    assert torch.equal(found, found.T)
    assert packed.correlations.shape == (length(width),)
    assert packed.directions.shape[0] <= DIRECTIONS
    torch.testing.assert_close(found.diagonal(), H.diagonal(), rtol=3e-6, atol=0)
    # Feedback adds a tenth of the mean moment; an error may be no part of that.
    error = torch.linalg.eigvalsh(found.double() - H.double()).abs().max()
    assert error < 1e-3 * H.diagonal().double().mean()
    assert not found[-1].any()


def test_the_values_are_those_of_the_definition():
    """H = V^T V + D C D, of a triangle made by hand."""
    root = torch.tensor([1.0, 2.0, 3.0])
    V = torch.tensor([[1.0, 0.5, -2.0]])
    steps = torch.tensor([32767, -16000, 8, 0], dtype=torch.int16)
    C = torch.eye(3, dtype=torch.float64)
    for (i, j), step in zip(((1, 0), (2, 0), (2, 1)), steps.tolist(), strict=False):
        C[i, j] = C[j, i] = step / 32767
    D = torch.diag(root.double())
    found = unpack(Triangle(root.square(), V, steps))
    torch.testing.assert_close(found.double(), V.double().T @ V.double() + D @ C @ D)


def test_directions_that_are_not_there_are_left_out():
    """A matrix of rank two: what is below rounding would be divided by."""
    rows = gaussian(2, 50, seed=4)
    H = rows.T @ rows
    packed = pack(H)
    assert len(packed.directions) == 2
    torch.testing.assert_close(unpack(packed), H, rtol=1e-4, atol=1e-4)
