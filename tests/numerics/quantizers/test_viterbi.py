"""The search for codes: nearly the best there are, and the same in the kernel as in tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_cli.numerics.quantizers.trellis_code import SEQUENCE, SHORTEST, levels, numbers
from loftq_cli.numerics.quantizers.viterbi import search
from tests.support import textbook_trellis
from tests.support.quantizing import PROPERTY, gaussian, needs_kernels


def cost(wanted: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Of each ring, float64."""
    codes = search(wanted, scales)
    assert codes.dtype == torch.uint8
    units = levels(torch.device("cpu"))[numbers(codes.T)].T
    return (wanted.double() - scales.double() * units.double()).square().sum(dim=1)


@pytest.mark.parametrize("length", [SHORTEST, 40, 100])
def test_codes_cost_hardly_more_than_the_best_of_all(length: int) -> None:
    wanted, scales = gaussian(4, length, seed=length), gaussian(4, length, seed=1).exp()
    best = [
        textbook_trellis.least_cost(*each) for each in zip(wanted * scales, scales, strict=True)
    ]
    found = cost(wanted * scales, scales)
    assert bool((found >= torch.tensor(best) * (1 - 1e-6)).all())
    assert float(found.sum()) <= 1.02 * sum(best)


@needs_kernels
@PROPERTY
@given(st.integers(SHORTEST, SEQUENCE), st.integers(0, 1000), st.integers(-30, 30))
def test_tensor_operations_find_the_same_codes(length: int, seed: int, power: int) -> None:
    wanted = gaussian(3, length, seed=seed) * 10.0**power
    scales = gaussian(3, length, seed=seed + 1) * 10.0**power
    assert torch.equal(search(wanted, scales), search(wanted, scales, compiled=False))


def test_without_kernels_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, scales = gaussian(7, 30), torch.ones(7, 30)
    whole = search(wanted, scales, compiled=False)
    monkeypatch.setattr("loftq_cli.numerics.quantizers.viterbi._CHUNK_STATES", 2048)
    assert torch.equal(search(wanted, scales, compiled=False), whole)


def test_no_rings_have_no_codes() -> None:
    assert search(torch.empty(0, 256), torch.empty(0, 256)).shape == (0, 256)


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e30, 3e38])
def test_values_without_a_scale_have_codes_too(value: float) -> None:
    codes = search(torch.full((2, 30), value), torch.zeros(2, 30))
    assert int(codes.max()) < 4
