"""Which weights the code of a model reads itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from loftq_cli.families.code import weights_read


class Base(nn.Module):
    def __init__(self, fused: bool = False, limit: float | None = None) -> None:
        super().__init__()
        self.fused, self.limit = fused, limit
        self.called, self.handed, self.clamped = (nn.Linear(2, 2) for _ in range(3))
        self.cast_to, self.asked, self.inherited = (nn.Linear(2, 2) for _ in range(3))
        self.branched, self.indexed = nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)])
        self.table = nn.Sequential(nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 2))
        self.blocks: Any = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(2)])
        nn.init.zeros_(self.called.weight)

    def _init_weights(self) -> None:
        self.called.weight.data.zero_()

    def overridden(self) -> torch.Tensor:
        return self.called.weight

    def helper(self) -> torch.Tensor:
        return self.inherited.weight


class Model(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.called(x) + functional.linear(x, self.handed.weight)
        if self.training and self.limit is not None:
            self.clamped.weight.data.clamp_(-self.limit, self.limit)
        if isinstance(self.asked.weight, torch.Tensor) and self.asked.weight.device == x.device:
            x = x.to(self.cast_to.weight.dtype)
        y = functional.linear(x, self.branched.weight) if self.fused else self.branched(x)
        y = self.table(y.to(next(self.table.parameters()).dtype)) @ self.indexed[0].weight
        for block in self.blocks:
            y = y @ block.inner.weight
        return y

    def overridden(self) -> torch.Tensor:
        return self.called(torch.ones(2))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("limit", [None, 1.0])
def test_what_is_called_is_told_from_what_is_read(fused, limit) -> None:
    expected = {"handed": "value", "cast_to": "dtype", "inherited": "value"}
    expected |= {"indexed.0": "value", "table.1": "dtype"}
    expected |= {"branched": "value"} if fused else {}
    expected |= {} if limit is None else {"clamped": "value"}
    assert weights_read(Model(fused, limit)) == expected


class Rescaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList([nn.ModuleDict({"mlp": Base()}) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            layer.mlp.called.weight.div_(2)
        return x


def test_a_weight_deep_in_a_block_is_found_in_every_block() -> None:
    found = weights_read(Rescaled())
    rescaled = {name for name, use in found.items() if name.endswith("called")}
    assert rescaled == {"layers.0.mlp.called", "layers.1.mlp.called"}


@pytest.mark.parametrize(("kind", "settings"), [("bloom", {}), ("gptj", {"rotary_dim": 4})])
def test_branches_that_settings_rule_out_keep_no_layer_from_being_converted(kind, settings) -> None:
    """Bloom reads two weights itself where it imitates a parallel training."""
    sizes = {"n_layer": 1, "n_head": 4, "vocab_size": 32}
    width = {"hidden_size": 32} if kind == "bloom" else {"n_embd": 32}
    config = transformers.AutoConfig.for_model(kind, **sizes, **width, **settings)
    assert weights_read(transformers.AutoModelForCausalLM.from_config(config)) == {}
    if kind == "bloom":
        config.pretraining_tp, config.slow_but_exact = 2, True
        found = weights_read(transformers.AutoModelForCausalLM.from_config(config))
        assert {name.rpartition(".")[2] for name in found} == {"dense", "dense_4h_to_h"}
