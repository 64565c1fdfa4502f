"""Norms against float64, and the first value that is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_cli.numerics.metrics import first_non_finite, squared_norm
from tests.support.quantizing import PROPERTY, gaussian

SHAPES = [(1, 1), (1, 255), (255, 1), (3, 257), (64, 4096), (4096, 64)]


def exact(rows: torch.Tensor) -> float:
    return math.fsum(float(row.double().square().sum()) for row in rows)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.02, 1e-10, 1e-20, 1e-40, 1e10, 1e20, 1e37])
def test_squared_norm_is_that_of_float64(shape, factor):
    rows = gaussian(*shape) * factor
    assert squared_norm(rows) == pytest.approx(exact(rows), rel=1e-6)


@pytest.mark.parametrize("shape", [(4096, 4096), (1, 4096**2), (4096**2, 1)], ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "constant"])
def test_squared_norm_of_16_million_elements(shape, kind):
    rows = gaussian(*shape) if kind == "gaussian" else torch.full(shape, 0.1)
    expected = float(rows.double().square().sum())
    assert squared_norm(rows) == pytest.approx(expected, rel=1e-6)


def test_squared_norm_adds_magnitudes_far_apart():
    rows = torch.full((8, 512), 1e-3)
    rows[5, 5] = 3e38
    assert squared_norm(rows) == pytest.approx(exact(rows), rel=1e-6)
    rows[5, 5] = 1e4
    assert squared_norm(rows) == pytest.approx(exact(rows), rel=1e-6)


@pytest.mark.parametrize("rows", [torch.zeros(4, 300), torch.zeros(0, 5), torch.zeros(5, 0)])
def test_squared_norm_of_nothing_is_zero(rows):
    assert squared_norm(rows) == 0


def test_squared_norm_of_a_view_counts_its_own_elements_only():
    matrix = gaussian(64, 600)
    view = matrix[3:40, 10:500]
    assert squared_norm(view) == pytest.approx(exact(view), rel=1e-6)
    assert squared_norm(matrix.T) == pytest.approx(exact(matrix), rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_norm_of_non_finite_values_is_not_finite(value):
    rows = gaussian(4, 300)
    rows[2, 7] = value
    assert not math.isfinite(squared_norm(rows))


@PROPERTY
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    data=st.data(),
)
def test_first_non_finite_is_the_first_in_row_major_order(rows, columns, data):
    spots = data.draw(st.lists(st.integers(0, rows * columns - 1), max_size=5))
    values = data.draw(
        st.lists(
            st.sampled_from([math.nan, math.inf, -math.inf]),
            min_size=len(spots),
            max_size=len(spots),
        )
    )
    weight = torch.zeros(rows, columns)
    for spot, value in zip(spots, values):
        weight.view(-1)[spot] = value
    found = first_non_finite(weight)
    if not spots:
        assert found is None
        return
    assert found is not None
    (row, column), value = found
    assert row * columns + column == min(spots)
    assert str(value) == str(float(weight[row, column]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_finite_values_are_finite(dtype):
    limits = torch.finfo(dtype)
    weight = torch.tensor([[limits.max, limits.min, limits.tiny, 0.0, -0.0]], dtype=dtype)
    assert first_non_finite(weight) is None
    weight[0, 3] = -math.inf
    assert first_non_finite(weight) == ((0, 3), -math.inf)
