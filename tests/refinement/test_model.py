"""Which dtype the weights of a model are in while it is refined."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from loftq_cli.refinement import model
from loftq_cli.refinement.model import Prepared

NAMES = ("linear", "turned", "table", "head")


class Conv1D(nn.Module):
    """A linear layer by the name of transformers' own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))


def prepared(**parts: nn.Module) -> Prepared:
    """Of a model with those parts, whose matrices are named as they are."""
    calibration: Any = SimpleNamespace(
        model=nn.ModuleDict(parts), layers={name: name for name in parts}
    )
    conversion: Any = None
    return Prepared(conversion, calibration, torch.device("cpu"))


@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float32])
def test_what_is_only_multiplied_with_is_in_the_dtype_of_products(
    fast: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "fastest_products", lambda device: fast)
    head, table = nn.Linear(8, 8, bias=False), nn.Embedding(8, 8)
    head.weight = table.weight
    found = prepared(linear=nn.Linear(8, 8), turned=Conv1D(), table=table, head=head)
    held = [found.weight(name).data_ptr() for name in NAMES]
    values = found.weight("linear").detach().clone()
    with found.narrowed(NAMES):
        kept = torch.float32
        assert [found.weight(name).dtype for name in NAMES] == [fast, fast, kept, kept]
        torch.testing.assert_close(found.weight("linear").data.float(), values, rtol=1e-2, atol=0)
    assert [found.weight(name).data_ptr() for name in NAMES] == held
    assert torch.equal(found.weight("linear").data, values)


def test_what_is_offloaded_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "fastest_products", lambda device: torch.bfloat16)
    found = prepared(linear=nn.Linear(8, 8, device="meta"))
    with found.narrowed(["linear"]):
        assert found.weight("linear").dtype == torch.float32


def test_weights_that_are_narrow_already_stay_where_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model, "fastest_products", lambda device: torch.bfloat16)
    found = prepared(linear=nn.Linear(8, 8).bfloat16())
    held = found.weight("linear").data_ptr()
    with found.narrowed(["linear"]):
        assert found.weight("linear").data_ptr() == held
    assert found.weight("linear").dtype == torch.bfloat16
