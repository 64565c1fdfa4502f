"""Every method on a device: what it gives there is what the CPU's tensor operations give, and the
host seldom waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import loftq_cli
from loftq_cli.kernels import native
from loftq_cli.numerics import lowrank, metrics
from loftq_cli.numerics.quantizers import methods
from tests.support.stand_in.runtime import stand_in_devices
from tests.support.synthetic import llm_like

METHODS = [(name, min(methods.widths(name))) for name in methods.names()]
SETTINGS: dict[str, Any] = {"rank": 4, "iters": 2}
PRODUCTS = {"none": torch.float32, "diagonal": torch.bfloat16, "full": torch.bfloat16}
WEIGHT = llm_like(48, 100)
INPUTS = torch.randn(400, 100, generator=torch.Generator().manual_seed(1)).cumsum(dim=1)


@pytest.fixture(autouse=True)
def tensor_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU computes as a device does: without compiled kernels, and sums of squares at once."""
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(metrics, "_at_once", lambda rows: True)


def moments_of(kind: str, width: int) -> torch.Tensor | None:
    inputs = INPUTS[:, :width]
    full = inputs.T @ inputs / len(inputs)
    return {"none": None, "diagonal": full.diagonal().clone(), "full": full}[kind]


def same(found: Any, expected: Any) -> bool:
    """Of two decompositions, the first on a device."""
    there = found.quantized.to(torch.device("cpu"))
    pairs = [
        *(
            (getattr(there, name), getattr(expected.quantized, name))
            for name in ("codes", "scales")
        ),
        *((getattr(found, name).cpu(), getattr(expected, name)) for name in ("lora_A", "lora_B")),
    ]
    return (
        all(torch.equal(*pair) for pair in pairs)
        and found.frobenius == expected.frobenius
        and found.weighted == expected.weighted
    )


@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
@pytest.mark.parametrize(("method", "bits"), METHODS)
def test_it_gives_the_bits_of_the_tensor_path(
    method: str, bits: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowrank, "fastest_products", lambda device: PRODUCTS[kind])
    settings = {**SETTINGS, "method": method, "bits": bits}
    # Viterbi's search by tensor operations takes its time for every column.
    width = 16 if method == "trellis" else WEIGHT.shape[1]
    weight, moments = WEIGHT[:, :width], moments_of(kind, width)
    expected = loftq_cli.decompose(weight, moments=moments, **settings)
    with stand_in_devices():
        found = loftq_cli.decompose(weight.cuda(), moments=moments, **settings)
        assert found.lora_A.device == found.quantized.codes.device == torch.device("cuda:0")
        assert same(found, expected)


@pytest.mark.parametrize(
    "settings", [{"svd": "exact"}, {"order": "svd-first"}, {"preset": "paper"}]
)
def test_so_it_does_with_other_settings(settings: dict[str, Any]) -> None:
    settings = {**SETTINGS, "bits": 2, "method": "nf", **settings}
    expected = loftq_cli.decompose(WEIGHT.bfloat16(), **settings)
    with stand_in_devices(bfloat16=lowrank.fastest_products(WEIGHT.device) == torch.bfloat16):
        assert same(loftq_cli.decompose(WEIGHT.bfloat16().cuda(), **settings), expected)


@pytest.mark.parametrize(("method", "bits"), METHODS)
def test_the_host_waits_a_fixed_number_of_times(method: str, bits: int) -> None:
    """However wide the matrix is: nothing waits for a column, or for a block of rows."""

    def seen(columns: int) -> tuple[int, int]:
        weight, moments = llm_like(16, columns), torch.eye(columns) + 0.1
        with stand_in_devices() as tally:
            there = weight.cuda()
            loftq_cli.decompose(there, method=method, bits=bits, moments=moments, **SETTINGS)
            return sum(tally.waits.values()), sum(tally.brought.values())

    (waits, brought), (waits_wide, brought_wide) = seen(64), seen(576)
    assert waits == waits_wide
    assert brought >= brought_wide  # tables are brought there once
    rounds = 12 + 3  # in which levels are fitted, on the host
    assert waits + brought_wide <= 50 + (6 * rounds if method == "fitted" else 0)
