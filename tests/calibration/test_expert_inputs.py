"""Moments of the inputs of experts against float64, token by token; and what a conversion makes of
them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional

import loftq_cli
from loftq_cli.calibration.expert_inputs import FEW
from loftq_cli.statistics.statistics import Statistics
from tests.support import models, moe
from tests.support.calibrated import LENGTH, TEXT, measured
from tests.support.models import CHARACTERS, FIRST_CHARACTER

LEAVES = {
    "mixtral": ("w1", "w3", "w2"),
    "qwen3_moe": ("gate_proj", "up_proj", "down_proj"),
    "gpt_oss": ("gate_up_proj", "gate_up_proj", "down_proj"),  # of tensors of all experts
}
PLACE = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp", "gpt_oss": "mlp"}
ROOM = LENGTH - 2  # <s> and </s> are around every window


@pytest.fixture(scope="module", params=LEAVES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    return models.save_tokenizer(models.save(moe.make(request.param), place / request.param))


def inner(module: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What an expert's down is given for x (in,)."""
    if type(module).__name__ != "GptOssExperts":
        gate, up = (module.gate_up_proj[expert] @ x).chunk(2)
        return functional.silu(gate) * up
    both = x @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
    gate, up = both[::2].clamp(max=7), both[1::2].clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def rows(directory: Path) -> dict[tuple[int, int, str], torch.Tensor]:
    """The inputs (tokens, in) of each layer's experts, by the names "given" and "inner"."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    seen: dict[tuple[int, int, str], list[torch.Tensor]] = {}

    def see(number: int, module: Any, args: Any) -> None:
        hidden, index = args[0], args[1]
        for token, chosen in enumerate(index.tolist()):
            for expert in chosen:
                x = hidden[token]
                seen.setdefault((number, expert, "given"), []).append(x)
                seen.setdefault((number, expert, "inner"), []).append(inner(module, expert, x))

    for number, layer in enumerate(model.model.layers):
        layer.mlp.experts.register_forward_pre_hook(
            lambda module, args, number=number: see(number, module, args)
        )
    ids = [FIRST_CHARACTER + CHARACTERS.index(character) for character in TEXT]
    for start in range(0, len(ids) - ROOM + 1, ROOM):
        with torch.no_grad():
            model(input_ids=torch.tensor([[1, *ids[start : start + ROOM], 2]]))
    return {key: torch.stack(values).double() for key, values in seen.items()}


def weight(kind: str, layer: int, expert: int, leaf: str) -> str:
    return f"model.layers.{layer}.{PLACE[kind]}.experts.{expert}.{leaf}.weight"


def near(statistics: Statistics, name: str, expected: torch.Tensor) -> None:
    found = statistics.moments(name).double()
    if found.dim() == 1:
        expected = expected.diagonal()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_moments_are_those_of_the_tokens_sent_to_each(source, notes, kind):
    family = source.name
    statistics = measured(source, notes, moments=kind)
    held = rows(source)
    gate, up, down = LEAVES[family]
    own = few = 0
    for layer in range(2):
        of_layer = torch.cat([held[key] for key in held if key[0] == layer and key[2] == "given"])
        for expert in range(4):
            given = held.get((layer, expert, "given"), of_layer[:0])
            gated = held.get((layer, expert, "inner"), of_layer[:0])
            enough = len(given) >= FEW
            own, few = own + enough, few + (not enough)
            taken = given if enough and kind == "diagonal" else of_layer
            for leaf in (gate, up):
                near(statistics, weight(family, layer, expert, leaf), taken.T @ taken / len(taken))
                assert statistics.tokens(weight(family, layer, expert, leaf)) == len(taken)
            assert (weight(family, layer, expert, down) in statistics.matrices) == enough
            if enough:
                name = weight(family, layer, expert, down)
                near(statistics, name, gated.T @ gated / len(gated))
    assert own > 0


def test_experts_with_few_tokens_have_those_of_the_layer(source, tmp_path):
    """A text of one window: some experts get next to nothing."""
    short = tmp_path / "short.txt"
    short.write_text(TEXT[: ROOM + 1])
    statistics = measured(source, short, moments="diagonal")
    family, layer = source.name, 0
    names = [weight(family, layer, expert, LEAVES[family][0]) for expert in range(4)]
    shared = {statistics.matrices[name] for name in names}
    assert len(shared) < 4
    assert not [
        name for name in statistics.matrices if name.endswith(f"{LEAVES[family][2]}.weight")
    ]


def test_experts_are_converted_with_them(source, notes, tmp_path):
    statistics = measured(source, notes, moments="full")
    settings: dict[str, Any] = {"bits": 2, "rank": 4, "iters": 2, "threads": 1}
    with_them = loftq_cli.convert(source, tmp_path / "with", stats=statistics.path, **settings)
    without = loftq_cli.convert(source, tmp_path / "without", **settings)
    found = {m["name"]: m for m in with_them["matrices"] if ".experts." in m["name"]}
    assert len(found) == 2 * 4 * len(set(LEAVES[source.name]))
    kinds = {m["weighted"]["kind"] for m in found.values() if "weighted" in m}
    assert kinds == {"full"}
    plain = loftq_cli.error_report(tmp_path / "without", source, statistics.path)
    ours = loftq_cli.error_report(tmp_path / "with", source, statistics.path)
    assert ours["totals"]["weighted_residual"] < 0.9 * plain["totals"]["weighted_residual"]
    assert without["recipe"]["stats"] is None
