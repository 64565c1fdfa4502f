"""The leading directions of inputs, against float64 eigenvectors."""

from __future__ import annotations

import pytest
import torch

from loftq_cli.numerics.leading import leading, without
from loftq_cli.numerics.weighting import make_weighting
from tests.numerics.test_weighting import moments
from tests.support.quantizing import gaussian


@pytest.mark.parametrize("count", [1, 16, 96])
@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_what_is_left_is_what_the_eigenvectors_leave(kind: str, count: int) -> None:
    H = moments(kind, 96)
    rows = leading(make_weighting(H.clone(), torch.bfloat16), count)
    torch.testing.assert_close(rows @ rows.T, torch.eye(count), rtol=0, atol=1e-5)
    error = gaussian(40, 96, seed=9)
    rest = without(error, rows).double()
    whole = (torch.diag(H) if kind == "diagonal" else H).double()
    vectors = torch.linalg.eigh(whole).eigenvectors[:, : 96 - count]
    best = error.double() @ vectors @ vectors.T

    def squared(matrix: torch.Tensor) -> float:
        return float(((matrix @ whole) * matrix).sum())

    assert squared(rest) <= 1.02 * squared(best) + 1e-9 * squared(error.double())
    assert torch.equal(error, gaussian(40, 96, seed=9))
