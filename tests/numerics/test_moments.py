"""Second moments, against sums written out in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_cli.errors import NonFiniteActivationError, UsageError
from loftq_cli.numerics.moments import Moments
from tests.support.makers import PROPERTY


def inputs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) + 0.3).to(dtype)


def written_out(rows: torch.Tensor, full: bool) -> torch.Tensor:
    """E[x x^T] or its diagonal, one token after the other."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for row in rows.double():
        total += torch.outer(row, row)
    total /= len(rows)
    return total if full else total.diagonal()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_moments_are_means_over_all_tokens_that_were_added(full, dtype):
    first, second = inputs(2, 5, 6, dtype=dtype), inputs(3, 6, seed=1, dtype=dtype)
    moments = Moments(6, full=full)
    moments.add(first)
    moments.add(second)
    value = moments.value()
    assert moments.tokens == 13
    assert value.dtype == torch.float32
    assert value.shape == ((6, 6) if full else (6,))
    expected = written_out(torch.cat([first.reshape(-1, 6), second]), full)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)


@PROPERTY
@given(rows=st.integers(1, 40), cuts=st.lists(st.integers(1, 39), max_size=4))
def test_how_the_tokens_are_split_does_not_matter(rows, cuts):
    whole = inputs(rows, 3)
    bounds = [0, *sorted(cut for cut in set(cuts) if cut < rows), rows]
    moments = Moments(3, full=True)
    for start, stop in itertools.pairwise(bounds):
        moments.add(whole[start:stop])
    torch.testing.assert_close(
        moments.value().double(), written_out(whole, True), rtol=1e-6, atol=1e-7
    )


def test_more_tokens_than_are_worked_on_at_once():
    rows = inputs(5000, 2)
    moments = Moments(2, full=True)
    moments.add(rows)
    expected = rows.double().T @ rows.double() / 5000
    torch.testing.assert_close(moments.value().double(), expected, rtol=1e-6, atol=1e-6)


def test_many_tokens_do_not_drown_in_rounding():
    moments = Moments(1)
    ones = torch.ones(1 << 16, 1)
    for _ in range(512):  # 2^25 tokens: float32 sums of ones stop at 2^24
        moments.add(ones)
    assert moments.tokens == 1 << 25
    assert moments.value().item() == 1.0


@pytest.mark.parametrize("full", [False, True])
def test_a_mask_leaves_tokens_out(full):
    batch = inputs(2, 4, 3)
    batch[0, 3] = torch.nan  # padding may hold anything
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]])
    moments = Moments(3, full=full)
    moments.add(batch, mask)
    moments.add(batch, torch.zeros(2, 4))
    kept = torch.stack(
        [batch[0, 0], batch[0, 1], batch[0, 2], batch[1, 0], batch[1, 2], batch[1, 3]]
    )
    assert moments.tokens == 6
    expected = written_out(kept, full)
    torch.testing.assert_close(moments.value().double(), expected, rtol=1e-6, atol=1e-7)


def test_the_matrix_is_symmetric_to_the_bit():
    moments = Moments(300, full=True)
    moments.add(inputs(70, 300))
    assert torch.equal(moments.value(), moments.value().T)


@pytest.mark.parametrize("full", [False, True])
def test_squares_beyond_float32_are_summed_in_float64(full):
    moments = Moments(2, full=full)
    moments.add(torch.tensor([[1e19, 1.0]]))
    moments.add(torch.zeros(99, 2))
    value = moments.value()
    assert value.flatten()[0].item() == pytest.approx(1e36, rel=1e-6)
    moments.add(torch.tensor([[3e19, 1.0]]))
    assert moments.value().flatten()[0].item() == pytest.approx(1e39 / 101, rel=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused_and_not_counted(bad):
    moments = Moments(2)
    moments.add(torch.ones(3, 2))
    with pytest.raises(NonFiniteActivationError, match="NaN or Inf"):
        moments.add(torch.tensor([[1.0, bad]]))
    assert moments.tokens == 3
    assert moments.value().tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "wrong", [torch.ones(2, 4), torch.ones(()), torch.ones(2, 3, dtype=torch.int64)]
)
def test_inputs_of_another_shape_or_dtype_are_refused(wrong):
    with pytest.raises(UsageError, match=r"\(\.\.\., 3\)"):
        Moments(3).add(wrong)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(UsageError, match="a mask of shape"):
        Moments(3).add(torch.ones(2, 4, 3), torch.ones(4, 2))


def test_nothing_has_no_moments():
    moments = Moments(3)
    moments.add(torch.ones(0, 3))
    with pytest.raises(UsageError, match="no inputs"):
        moments.value()
    with pytest.raises(UsageError, match="in_features 0"):
        Moments(0)


@pytest.mark.parametrize("full", [False, True])
def test_moments_of_several_inputs_together(full):
    parts = [Moments(3, full=full) for _ in range(3)]
    rows = [inputs(4, 3), inputs(9, 3, seed=2)]
    for part, values in zip(parts, rows):
        part.add(values)
    together = Moments.together(parts)
    assert together.tokens == 13
    expected = written_out(torch.cat(rows), full)
    torch.testing.assert_close(together.value().double(), expected, rtol=1e-6, atol=1e-7)
    assert parts[0].tokens == 4
    torch.testing.assert_close(
        parts[0].value().double(), written_out(rows[0], full), rtol=1e-6, atol=1e-7
    )
