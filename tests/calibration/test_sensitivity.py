"""Sensitivities against plain autograd in float64, and against the divergence that they predict."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from loftq_cli.calibration import calibrate as calibrating
from loftq_cli.calibration import sensitivity
from loftq_cli.calibration.calibrate import Measuring, calibrate
from loftq_cli.calibration.expert_inputs import FEW
from loftq_cli.checkpoint.request import Request
from loftq_cli.errors import StatisticsError, UnsupportedInputError
from loftq_cli.machine.observer import Observer
from loftq_cli.statistics.file import open_statistics
from loftq_cli.statistics.statistics import Statistics
from loftq_cli.statistics.writer import StatisticsWriter
from tests.support import models, moe
from tests.support.calibrated import LENGTH, TEXT
from tests.support.models import CHARACTERS, FIRST_CHARACTER

ROOM = LENGTH - 2  # <s> and </s> are around every window


def windows() -> torch.Tensor:
    ids = [FIRST_CHARACTER + CHARACTERS.index(character) for character in TEXT]
    starts = range(0, len(ids) - ROOM + 1, ROOM)
    return torch.tensor([[1, *ids[start : start + ROOM], 2] for start in starts])


def measured(directory: Path, notes: Path) -> Statistics:
    output = notes.parent / "stats.safetensors"
    settings = Measuring(length=LENGTH, device="cpu", sensitivity="needed")
    calibrate(Request(str(directory)), output, [notes], settings, observer=Observer())
    return open_statistics(output)


def reference(directory: Path, model_class: Any) -> dict[str, float]:
    """E[|g|^2 |x|^2] / (out * E[|x|^2]) of every linear layer, from float64 gradients of the whole
    model, with nothing computed again."""
    model = model_class.from_pretrained(directory).double().eval()
    generator = torch.Generator().manual_seed(0)
    sums: dict[str, list[float]] = {}
    calls: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def see(name: str, module: Any, args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        calls.append((name, args[0], output))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(functools.partial(see, name))
    found = windows()
    count = min(len(found), sensitivity.MOST_WINDOWS)
    for window in found[:: len(found) // count][:count]:
        inputs = {"input_ids": window[None]}
        if model.config.is_encoder_decoder:
            first = torch.tensor([[model.config.decoder_start_token_id]])
            inputs["decoder_input_ids"] = torch.cat([first, window[None, :-1]], dim=1)
        calls.clear()
        output = model(**inputs)
        if "logits" in output:
            likely = torch.softmax(output.logits[0].float(), dim=-1)
            drawn = torch.multinomial(likely.detach(), 1, generator=generator)
            loss = -torch.log_softmax(output.logits[0], dim=-1).gather(1, drawn).sum()
        else:
            states = output.last_hidden_state[0]
            drawn = torch.randn(states.shape, generator=generator).double()
            loss = (states / states.detach().norm(dim=1, keepdim=True) * drawn).sum()
        loss.backward()
        for name, given, made in calls:
            if made.grad is None:
                continue  # a pooler, which the hidden states do not go through
            g, x = (each.detach().flatten(0, -2).square().sum(1) for each in (made.grad, given))
            held = sums.setdefault(name, [0.0, 0.0, made.shape[-1]])
            held[0] += float((g * x).sum())
            held[1] += float(x.sum())
    return {name: product / (energy * out) for name, (product, energy, out) in sums.items()}


@pytest.mark.parametrize(
    ("family", "model_class"),
    [
        ("llama", transformers.LlamaForCausalLM),
        ("bert", transformers.BertModel),
        ("bart", transformers.BartForConditionalGeneration),
    ],
)
def test_they_are_those_of_plain_gradients(
    family: str, model_class: Any, checkpoint: Any, notes: Path
) -> None:
    directory = checkpoint(family)
    found = measured(directory, notes)
    assert set(found.sensitivity) == set(found.matrices)
    expected = reference(directory, model_class)
    for name, value in found.sensitivity.items():
        assert value == pytest.approx(expected[name.removesuffix(".weight")], rel=1e-3), name
    assert max(found.sensitivity.values()) > 1.5 * min(found.sensitivity.values())


def test_they_predict_how_far_random_errors_take_a_model(checkpoint: Any, notes: Path) -> None:
    directory = checkpoint("llama")
    found = measured(directory, notes)
    model = transformers.LlamaForCausalLM.from_pretrained(directory).double().eval()
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    predicted = 0.0
    for name, value in found.sensitivity.items():
        weight = moved.get_parameter(name)
        error = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        squared = float((error.square() @ found.moments(name).double()).sum())
        # As much from every matrix; moments beside the diagonal meet errors of either sign.
        error *= (2e-5 / (value * squared)) ** 0.5
        predicted += 1e-5
        weight.data += error
    with torch.no_grad():
        p, q = (torch.log_softmax(each(windows()).logits, dim=-1) for each in (model, moved))
    divergence = float((p.exp() * (p - q)).sum(dim=-1).mean())
    # More by what an error of all tokens does together, which sensitivities leave out.
    assert predicted < divergence < 2 * predicted


def mixture(directory: Path) -> dict[str, float]:
    """The same of the experts of two layers, token by token, from float64 gradients of a model
    that runs them so."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory).double().eval()
    calls: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def run(module: Any, layer: int, hidden: torch.Tensor, index: Any, weights: Any) -> Any:
        rows = []
        for token, x in enumerate(hidden):
            row = torch.zeros_like(x)
            for place, expert in enumerate(index[token].tolist()):
                gate, up = (module.gate_up_proj[expert] @ x).chunk(2)
                inner = nn.functional.silu(gate) * up
                down = module.down_proj[expert] @ inner
                for leaf, given, made in (("w1", x, gate), ("w3", x, up), ("w2", inner, down)):
                    made.retain_grad()
                    name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}.weight"
                    calls.setdefault(name, []).append((given, made))
                row = row + weights[token, place] * down
            rows.append(row)
        return torch.stack(rows)

    for number, layer in enumerate(model.model.layers):
        layer.mlp.experts.forward = functools.partial(run, layer.mlp.experts, number)
    generator = torch.Generator().manual_seed(0)
    sums: dict[str, list[float]] = {}
    found = windows()
    count = min(len(found), sensitivity.MOST_WINDOWS)
    for window in found[:: len(found) // count][:count]:
        calls.clear()
        logits = model(input_ids=window[None]).logits[0]
        likely = torch.softmax(logits.detach().float(), dim=-1)
        drawn = torch.multinomial(likely, 1, generator=generator)
        (-torch.log_softmax(logits, dim=-1).gather(1, drawn).sum()).backward()
        for name, pairs in calls.items():
            held = sums.setdefault(name, [0.0, 0.0, 0.0, 0.0])
            for x, made in pairs:
                assert made.grad is not None
                energy = float(x.detach().square().sum())
                held[0] += float(made.grad.square().sum()) * energy
                held[1] += energy
                held[2] += 1
                held[3] = made.numel()
    total = count * found.shape[1]
    alike = {name: re.sub(r"experts\.\d+", "", name) for name in sums}
    values = {}
    for name, (product, energy, tokens, out) in sums.items():
        if tokens < FEW:  # as a token of all of the layer
            others = [held for other, held in sums.items() if alike[other] == alike[name]]
            product, energy = sum(held[0] for held in others), sum(held[1] for held in others)
        values[name] = tokens / total * product / (out * energy)
    assert {tokens < FEW for _, _, tokens, _ in sums.values()} == {True, False}
    return values


def test_experts_in_one_module_have_those_of_their_tokens(notes: Path, tmp_path: Path) -> None:
    directory = models.save_tokenizer(models.save(moe.make("mixtral"), tmp_path / "mixtral"))
    found = measured(directory, notes)
    expected = mixture(directory)
    assert len(expected) == 2 * 4 * 3
    for name, value in expected.items():
        assert found.sensitivity[name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_that_a_short_text_does_not_reach_have_one_too(
    family: str, notes: Path, tmp_path: Path
) -> None:
    directory = models.save_tokenizer(models.save(moe.make(family), tmp_path / family))
    notes.write_text(TEXT[: ROOM + 1])
    found = measured(directory, notes).sensitivity
    experts = {name: value for name, value in found.items() if ".experts." in name}
    assert len(experts) == 2 * 4 * (2 if family == "gpt_oss" else 3)
    assert min(experts.values()) > 0


class _OneWay(torch.autograd.Function):
    """As a kernel that has no backward."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()


def test_a_model_without_gradients_is_refused_or_measured_without(
    checkpoint: Any, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint("llama")
    real = transformers.models.llama.modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(
        transformers.models.llama.modeling_llama.LlamaMLP,
        "forward",
        lambda self, x: _OneWay.apply(real(self, x)),
    )
    with pytest.raises(
        UnsupportedInputError, match="no gradient goes through LlamaForCausalLM"
    ) as e:
        measured(directory, notes)
    assert e.value.hint == "leave out --sensitivity"
    assert not (notes.parent / "stats.safetensors").exists()

    heard: list[str] = []

    class Listener(Observer):
        def note(self, text: str) -> None:
            heard.append(text)

    output = notes.parent / "without.safetensors"
    settings = Measuring(length=LENGTH, device="cpu", sensitivity="possible")
    calibrate(Request(str(directory)), output, [notes], settings, observer=Listener())
    assert any("without sensitivities: " in note for note in heard)
    assert open_statistics(output).sensitivity == {}


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_a_file_with_an_impossible_one_is_refused(value: float, tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    with StatisticsWriter(path, ["a.weight"], sensitivity={"a.weight": value}) as writer:
        writer.add(["a.weight"], torch.ones(4), 3)
        writer.publish()
    with pytest.raises(StatisticsError, match="sensitivity"):
        open_statistics(path)


def test_most_windows_are_taken_from_all_of_the_text() -> None:
    assert [sensitivity.windows_of(count) for count in (1, 16, 128)] == [1, 16, 16]
    assert calibrating.Measuring().sensitivity == "none"
