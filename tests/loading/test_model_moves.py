"""Copies of a loaded model, and moves to other dtypes and back: the packed tensors stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import loftq_cli
from loftq_cli.loading.packed_weight import PackedWeight

# peft asks transformers under a name that transformers is giving up.
TOKENS = torch.arange(24).view(2, 12) + 3
SETTINGS: list[dict[str, Any]] = [
    {"method": "nf"},
    {"method": "uniform", "scale_dtype": "int8"},
    {"method": "nf", "scale_dtype": "bfloat16", "embeddings": True},
]
every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def packed(model: Any) -> dict[str, torch.Tensor]:
    """Every packed tensor, by name."""
    return {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        if isinstance(module, PackedWeight)
        for key, tensor in module.state_dict().items()
        if key != "bias"
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@every_setting
def test_a_copy_computes_the_same_and_shares_nothing(converted, settings) -> None:
    model = loftq_cli.load(converted("llama", **settings))
    before, expected = logits(model), {k: t.clone() for k, t in model.state_dict().items()}
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), before)
    assert_same(packed(twin), packed(model))
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in twin.state_dict().values())
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-2)
    twin(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(twin), before)
    assert_same(model.state_dict(), expected)
    assert torch.equal(logits(model), before)


MOVES: dict[str, tuple[torch.dtype, Callable[[Any], Any]]] = {
    "to(bfloat16)": (torch.bfloat16, lambda model: model.to(torch.bfloat16)),
    "bfloat16()": (torch.bfloat16, lambda model: model.bfloat16()),
    "half()": (torch.float16, lambda model: model.half()),
    "double()": (torch.float64, lambda model: model.double()),
}


@pytest.mark.parametrize("move", MOVES)
@every_setting
def test_a_model_in_another_dtype_and_back_keeps_the_packed_tensors(
    converted, settings, move
) -> None:
    dtype, moved = MOVES[move]
    model = loftq_cli.load(converted("llama", **settings))
    before, held = logits(model), {name: t.clone() for name, t in packed(model).items()}
    model = moved(model)
    assert_same(packed(model), held)
    names = packed(model)
    others = {tensor.dtype for name, tensor in model.state_dict().items() if name not in names}
    assert others == {dtype}
    there = logits(model)
    assert there.dtype == dtype
    precision = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert (there.double() - before.double()).abs().max() < 16 * precision * before.abs().max()
    back = model.float()
    assert_same(packed(back), held)
    assert (logits(back) - before).abs().max() < 16 * precision * before.abs().max()
