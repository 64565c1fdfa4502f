"""The C kernel for tr(M H M^T) against its definition."""

from __future__ import annotations

import pytest
import torch

from loftq_cli.numerics import native_form
from tests.support.quantizing import gaussian


def moments(width: int) -> torch.Tensor:
    """Symmetric (width, width) bfloat16, in no order."""
    square = gaussian(width, width, seed=1)
    return (square + square.T).bfloat16()


def in_kernel(matrix: torch.Tensor, H: torch.Tensor) -> float:
    if not native_form.can_run(H):
        pytest.skip("no products of bfloat16 here")
    return native_form.quadratic_form(matrix, H)


@pytest.mark.parametrize("width", [64, 192, 256, 320, 832])
@pytest.mark.parametrize("rows", [1, 6, 515, 517, 1040])
def test_it_is_the_form_of_its_definition(rows, width):
    matrix, H = gaussian(rows, width).bfloat16(), moments(width)
    M = matrix.double()
    products = (M @ H.double()) * M
    # Terms of either sign: what float32 sums may lose is relative to their sizes.
    assert in_kernel(matrix, H) == pytest.approx(
        float(products.sum()), abs=1e-5 * float(products.abs().sum())
    )


def test_one_entry_of_the_moments_counts_where_it_is():
    width = 384
    for i, j in ((0, 0), (5, 70), (70, 5), (63, 64), (300, 20), (383, 383)):
        H = torch.zeros(width, width)
        H[i, j] = H[j, i] = 1
        M = torch.zeros(3, width)
        M[1, i], M[1, j] = 2, 4 if i != j else 2
        expected = 4.0 if i == j else 16.0
        assert in_kernel(M.bfloat16(), H.bfloat16()) == expected


def test_it_does_not_depend_on_the_threads():
    matrix, H = gaussian(2000, 128).bfloat16(), moments(128)
    threads = torch.get_num_threads()
    found = set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(in_kernel(matrix, H))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_it_takes_bfloat16_in_whole_tiles_alone():
    assert not native_form.can_run(moments(128).float())
    assert not native_form.can_run(moments(128).diagonal())
    assert not native_form.can_run(moments(96))
