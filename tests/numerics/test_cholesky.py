"""A factor by blocks of rows against its definition."""

from __future__ import annotations

import pytest
import torch

from loftq_cli.numerics.cholesky import unit_factor
from tests.support.quantizing import gaussian

CPU = torch.device("cpu")


def positive(size: int) -> torch.Tensor:
    """Symmetric positive definite, with a condition number of about 1000."""
    rows = gaussian(2 * size, size).double() * torch.logspace(0, -1, size, dtype=torch.float64)
    return (rows.T @ rows / size).float()


@pytest.mark.parametrize("size", [1, 30, 256, 257, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_it_takes_the_matrix_apart(size, dtype, stored):
    H = positive(size)
    before = H.clone()
    factor = unit_factor(lambda a, b: H[a:b, a:].clone(), size, CPU, dtype, stored)
    assert torch.equal(H, before)
    assert factor is not None
    assert factor.dtype == stored
    assert torch.equal(factor, factor.triu())
    assert torch.equal(factor.diagonal(), torch.ones(size, dtype=stored))
    cholesky = torch.linalg.cholesky(H.double(), upper=True)
    expected = cholesky / cholesky.diagonal()[:, None]
    tolerance = 1e-4 if stored == torch.float32 else 2**-8
    torch.testing.assert_close(factor.double(), expected, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("place", [0, 100, 300, 599])
def test_there_is_none_of_what_is_not_positive(place):
    H = positive(600)
    H[place, place] = -1e-3
    for dtype in (torch.float32, torch.float64):
        assert unit_factor(lambda a, b: H[a:b, a:].clone(), 600, CPU, dtype, dtype) is None
