"""The trellis code: its levels, and which codes choose which, against plain Python."""

from __future__ import annotations

import hashlib

import pytest
import torch

from loftq_cli.numerics.quantizers.trellis_code import SHORTEST, alone, levels, numbers
from tests.support import textbook_trellis

CPU = torch.device("cpu")


def test_levels_are_quantiles_in_the_order_of_a_hash() -> None:
    table = levels(CPU)
    assert table.tolist() == textbook_trellis.levels()
    # What files mean by their codes must never change.
    digest = hashlib.sha256(table.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "2f718be7d3645078c090ae4d66fffd1ad68ad057f667dc25259c0fde81cdcdfe"
    assert float(table.square().mean()) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("rows", [1, SHORTEST - 1, SHORTEST, 25, 255, 256, 257, 300, 513])
def test_a_level_is_chosen_by_the_codes_above_in_a_ring(rows: int) -> None:
    codes = torch.randint(4, (rows, 3), generator=torch.Generator().manual_seed(rows)).byte()
    chosen = levels(CPU)[numbers(codes)]
    assert torch.equal(chosen.double(), textbook_trellis.values(codes))


def test_codes_that_choose_alone_are_in_ascending_order() -> None:
    choice = levels(CPU)[alone(CPU)]
    torch.testing.assert_close(
        choice, torch.tensor([-1.510, -0.4528, 0.4528, 1.510]), rtol=0, atol=5e-3
    )
