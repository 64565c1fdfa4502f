"""Two chains of activations, against the whole models that they are of."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from loftq_cli.calibration.blockwise import OutOfTurnError, fresh, kept
from loftq_cli.refinement.block import main_output
from loftq_cli.refinement.chains import ORIGINAL, REFINED, Chains, in_evaluation, spilling
from tests.support import models

STACKS = {
    "llama": ["model.layers"],
    "bert": ["encoder.layer"],
    "bart": ["model.encoder.layers", "model.decoder.layers"],
}


def changed(model: Any, blocks: list[str]) -> Any:
    """The model with other linear weights in ``blocks``."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for name in blocks:
        for part in other.get_submodule(name).modules():
            if isinstance(part, torch.nn.Linear):
                with torch.no_grad():
                    part.weight += 0.05 * torch.randn(part.weight.shape, generator=generator)
    return other


@torch.no_grad()
def seen(model: Any, block: str, ids: torch.Tensor) -> torch.Tensor:
    """What ``block`` gives while the whole model runs."""
    found = []
    handle = model.get_submodule(block).register_forward_hook(
        lambda module, args, output: found.append(main_output(output).clone())
    )
    model(ids)
    handle.remove()
    (output,) = found
    return output


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("kind", STACKS)
def test_each_chain_is_its_model(kind: str, spilled: bool, tmp_path: Path) -> None:
    model = getattr(models, kind)()
    blocks = [f"{stack}.{number}" for stack in STACKS[kind] for number in range(2)]
    first, second = copy.deepcopy(model), changed(model, blocks)
    ids = torch.randint(4, 90, (3, 10), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def run(window: int) -> None:
        model(ids[window : window + 1])

    keep = spilling(tmp_path) if spilled else kept
    with Chains(model, run, range(3), keep) as chains:
        for name in blocks:
            outputs = {ORIGINAL: chains.outputs(name, ORIGINAL)}
            wanted = second.get_submodule(name).state_dict()
            model.get_submodule(name).load_state_dict(wanted)
            outputs[REFINED] = chains.outputs(name, REFINED)
            chains.finish(name, outputs)
            for chain, whole in ((ORIGINAL, first), (REFINED, second)):
                for window, value in outputs[chain].items():
                    expected = seen(whole, name, ids[window : window + 1])
                    torch.testing.assert_close(main_output(fresh(value)), expected)
        assert list(tmp_path.iterdir()) == []
    assert all("forward" not in model.get_submodule(name).__dict__ for name in blocks)


def test_a_block_that_is_not_reached_is_told_of() -> None:
    model = models.llama()
    with Chains(model, lambda window: None, [0]) as chains, pytest.raises(OutOfTurnError):
        chains.given("model.layers.0", ORIGINAL, 0)


def test_parameters_ask_for_no_gradient_meanwhile() -> None:
    model = models.llama()
    model.lm_head.weight.requires_grad_(False)
    with in_evaluation(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    asking = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert asking == {name for name, _ in model.named_parameters()} - {"lm_head.weight"}
