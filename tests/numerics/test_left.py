"""What an adapter leaves of second moments, against the definition in float64."""

from __future__ import annotations

import torch

from loftq_cli.numerics.left import Left
from loftq_cli.numerics.weighting import make_weighting
from tests.support.quantizing import gaussian

WIDTH, RANK = 48, 5


def made() -> tuple[torch.Tensor, torch.Tensor, Left]:
    """(H, A, what A leaves of H)."""
    inputs = gaussian(200, WIDTH) @ gaussian(WIDTH, WIDTH, seed=1)
    H, A = inputs.T @ inputs / len(inputs), gaussian(RANK, WIDTH, seed=2)
    weighting = make_weighting(H, torch.float32)
    return weighting.moments.clone(), A, Left.by(weighting, A)  # which are in units of their own


def textbook(H: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    H, A = H.double(), A.double()
    taken = H @ A.T @ torch.linalg.inv(A @ H @ A.T) @ A @ H
    left = H - 0.9 * taken
    return left + 0.1 * left.diagonal().mean() * torch.eye(WIDTH)


def test_nine_tenths_of_what_lies_in_the_span_of_a_are_taken() -> None:
    H, A, left = made()
    expected = textbook(H, A)
    scale = float(expected.diagonal().mean())
    torch.testing.assert_close(left.whole().double(), expected, rtol=1e-4, atol=1e-4 * scale)
    ridge = float(left.ridge())
    torch.testing.assert_close(
        left.diagonal().double() + ridge, expected.diagonal(), rtol=1e-4, atol=1e-4 * scale
    )


def test_rows_in_an_order_are_those_of_the_whole() -> None:
    _, _, left = made()
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(3))
    whole = left.whole()[order][:, order]
    for start, stop in ((0, 7), (7, 40), (40, WIDTH)):
        rows = left.rows(order, start, stop, left.ridge())
        torch.testing.assert_close(rows, whole[start:stop, start:], rtol=1e-4, atol=1e-3)


def test_rows_of_any_length_take_the_same() -> None:
    H, A, left = made()
    lengths = torch.tensor([1e-12, 1e6, 1.0, 3.0, 1e-3])
    other = Left.by(make_weighting(H, torch.float32), A * lengths[:, None])
    torch.testing.assert_close(other.whole(), left.whole(), rtol=1e-3, atol=1e-2)


def test_without_an_adapter_all_is_left() -> None:
    H, _, _ = made()
    left = Left.by(make_weighting(H.clone(), torch.float32), torch.zeros(0, WIDTH))
    expected = H + 0.1 * H.diagonal().mean() * torch.eye(WIDTH)
    torch.testing.assert_close(left.whole(), expected)
