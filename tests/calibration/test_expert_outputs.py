"""Experts that run one by one give what a family's own module gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

from loftq_cli.calibration.expert_outputs import one_by_one
from loftq_cli.families.experts import form_of
from tests.support import moe
from tests.support.moe import logits


def of(model: Any) -> dict[str, dict[str, str]]:
    """Its modules of experts, none of whose matrices are watched."""
    forms = {name: form_of(module) for name, module in model.named_modules()}
    return {name: {} for name, form in forms.items() if form is not None and not form.batched}


@pytest.mark.parametrize("family", [*moe.FUSED_BY_PEFT, *moe.FUSED_BY_US])
def test_they_give_what_the_module_gives(family: str) -> None:
    model = moe.family(family).eval()
    before, experts = logits(model), of(model)
    with one_by_one(model, experts, lambda name, output, inputs: output):
        inside = logits(model)
        names = {name for name in experts if "forward" in model.get_submodule(name).__dict__}
    assert names == set(experts)
    torch.testing.assert_close(inside, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    assert torch.equal(logits(model), before)
    assert not any("forward" in model.get_submodule(name).__dict__ for name in experts)


def test_every_matrix_is_watched_with_its_inputs_also_under_accelerate_s_hooks() -> None:
    model = moe.make("mixtral").eval()
    name = "model.layers.1.mlp.experts"
    module: Any = model.get_submodule(name)
    add_hook_to_module(module, ModelHook())
    leaves = ("gate_proj", "up_proj", "down_proj")
    weights = {f"{e}.{leaf}": f"{e} {leaf}" for e in range(4) for leaf in leaves}
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(weight: str, output: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        seen[weight] = output, inputs
        return output

    hooked = module.forward
    with one_by_one(model, {name: weights}, watch):
        logits(model)
    assert module.forward is hooked
    remove_hook_from_module(module)
    assert seen.keys() == {*weights.values()}
    for expert in range(4):
        gate, up, down = (seen[f"{expert} {leaf}"] for leaf in leaves)
        together = torch.cat([module.gate_up_proj[expert] @ x[:, None] for x in gate[1]], dim=1).T
        torch.testing.assert_close(torch.cat([gate[0], up[0]], dim=-1), together)
        torch.testing.assert_close(down[0], down[1] @ module.down_proj[expert].T)
