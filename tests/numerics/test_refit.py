"""Scales refit at given codes, against a least-squares problem for every row in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loftq_cli.numerics.alternation import decompose
from loftq_cli.numerics.decomposition import Decomposition, Procedure
from loftq_cli.numerics.quantizers.blocks import Quantized
from loftq_cli.numerics.quantizers.methods import make_quantizer
from loftq_cli.numerics.quantizers.portable import is_portable
from loftq_cli.numerics.quantizers.scale_storage import Stored, round_scales
from loftq_cli.numerics.refit import can_refit, refit_scales
from loftq_cli.numerics.weighting import make_weighting
from tests.support import textbook_trellis
from tests.support.quantizing import effective, gaussian
from tests.support.synthetic import llm_like


def moments(width: int, seed: int = 5) -> torch.Tensor:
    """Of inputs whose features depend on each other."""
    inputs = gaussian(3 * width, width, seed=seed) @ gaussian(width, width, seed=seed + 1)
    return inputs.T @ inputs / len(inputs)


def quantized(method: str, weight: torch.Tensor, block_size: int = 32) -> Quantized:
    bits = 2 if method == "trellis" else 3
    quantizer = make_quantizer(method, bits, block_size, "mse", native=False)
    return decompose(weight, quantizer, Procedure(rank=4, iters=0)).quantized


def best(held: Quantized, target: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """The scales that are best for the codes, by the definition: (out, groups), float64."""
    root = torch.linalg.cholesky(H.double())
    size, columns = held.block_size, held.shape[1]
    groups = -(-columns // size)
    zeros = None if held.zeros is None else held.zeros.view(-1, groups)
    found = []
    for row, codes in enumerate(held.codes):
        if held.is_trellis:
            units = textbook_trellis.values(held.codes)[row]
        elif held.levels is not None:
            units = held.levels[codes.long()].double()
        else:
            assert zeros is not None
            units = codes.double() - zeros[row].double().repeat_interleave(size)[:columns]
        spread = torch.zeros(groups, columns, dtype=torch.float64)
        for column in range(columns):
            spread[column // size, column] = units[column]
        design, wanted = (spread @ root).T, target[row].double() @ root
        found.append(torch.linalg.lstsq(design, wanted[:, None]).solution[:, 0])
    return torch.stack(found)


@pytest.mark.parametrize(
    ("method", "columns"),
    [("uniform", 128), ("uniform", 144), ("nf", 128), ("fitted", 96), ("trellis", 96)],
)
def test_the_scales_are_those_of_least_squares(method: str, columns: int) -> None:
    weight, H = llm_like(24, columns), moments(columns)
    held = quantized(method, weight)
    assert can_refit(held)
    found = refit_scales(held, weight - held.decode(), H, "float32")
    wanted = best(held, weight, H).float()
    torch.testing.assert_close(found.view_as(wanted), wanted, rtol=5e-3, atol=1e-6)
    before, after = (
        ((weight - each.decode()) @ H * (weight - each.decode())).sum(dim=1)
        for each in (held, replace(held, scales=found))
    )
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.99 * before.sum()


def test_blocks_that_go_on_in_the_next_row_are_left_alone() -> None:
    assert not can_refit(quantized("nf", llm_like(12, 72)))
    assert can_refit(quantized("uniform", llm_like(12, 72)))


def test_scales_stay_what_can_be_stored_and_near_what_they_were() -> None:
    weight, H = llm_like(24, 128), moments(128)
    coarse = quantized("nf", weight)
    cases: list[tuple[Stored, float]] = [("bfloat16", 1), ("int8", 1), ("half", 1), ("half", 0.01)]
    for stored, times in cases:  # the last with scales that few multiples of 2^-17 are near
        held = replace(coarse, scales=round_scales(coarse.scales * times, stored))
        found = refit_scales(held, weight * times - held.decode(), H, stored)
        assert torch.equal(round_scales(found, stored), found)
        assert not torch.equal(found, held.scales)
    quantizer = make_quantizer("uniform", 3, 32, "mse", True, native=False)
    held = decompose(weight, quantizer, Procedure(rank=4, iters=0)).quantized
    assert is_portable(refit_scales(held, weight - held.decode(), H, "float32"))
    far = replace(coarse, scales=coarse.scales / 5)
    assert torch.equal(refit_scales(far, weight - far.decode(), H, "float32"), far.scales)
    empty = replace(coarse, scales=torch.zeros_like(coarse.scales))
    assert not refit_scales(empty, weight, H, "float32").any()


@pytest.mark.parametrize("method", ["uniform", "nf", "fitted"])
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=str)
def test_more_passes_leave_less(method: str, products: torch.dtype) -> None:
    weight, H = llm_like(192, 128), moments(128)

    def after(passes: int) -> Decomposition:
        quantizer = make_quantizer(method, 2, 32, "mse", native=False)
        settings = Procedure(
            rank=8, iters=3, feedback=True, feedback_passes=passes, products=products
        )
        return decompose(weight, quantizer, settings, make_weighting(H.clone(), products))

    found = [after(passes) for passes in (1, 2, 3)]
    left = []
    for each in found:
        assert each.weighted is not None
        error = weight.double() - effective(each)
        exact = float((error @ H.double() * error).sum().sqrt())
        assert each.weighted.final == pytest.approx(exact, rel=3e-3)
        left.append(exact)
    assert left[1] < 0.995 * left[0]
    assert left[2] <= left[1] * (1 + 1e-4)
