"""Models run block by block give every layer what it gets in the model as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from loftq_cli.calibration.blockwise import BlockRunner
from loftq_cli.calibration.course import Course, block_of, course_of
from loftq_cli.calibration.layer_inputs import LayerInputs
from loftq_cli.errors import NonFiniteActivationError, UnsupportedInputError

WIDTH, WINDOWS = 8, 3


class Block(nn.Module):
    """Two layers on one input and a third on what they make; a block may pass more than that on."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.calls = 0

    def forward(
        self, hidden: torch.Tensor, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        self.calls += 1
        bias = hidden.mean(1, keepdim=True) if bias is None else bias
        mixed = self.left(hidden).tanh() * self.right(hidden)
        mixed += bias  # in place
        return hidden + self.out(mixed), bias


class TwoStacks(nn.Module):
    """An encoder whose blocks hand a bias on, as T5's, and a decoder that looks at its output."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, WIDTH)
        self.decoder = nn.ModuleList(Block() for _ in range(blocks))
        self.encoder: Any = nn.ModuleDict({"block": nn.ModuleList(Block() for _ in range(blocks))})
        self.norm = nn.LayerNorm(WIDTH)
        self.unused = nn.ModuleList([Block()])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden, bias = self.embed(ids), None
        for block in self.encoder["block"]:
            hidden, bias = block(hidden, bias)
        memory = self.norm(hidden)
        hidden = self.embed(ids.flip(1)) + memory
        for block in self.decoder:
            hidden, _ = block(hidden, bias=memory)
        return hidden


class Skipping(nn.Module):
    """The last block gets more than what the one before gave."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, WIDTH)
        self.blocks: Any = nn.ModuleList(Block() for _ in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        first, _ = self.blocks[0](self.embed(ids))
        second, _ = self.blocks[1](first)
        third, _ = self.blocks[2](first + second)
        return third


class Repeating(Skipping):
    """The same block several times, as ALBERT."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for _ in range(3):
            hidden, _ = self.blocks[0](hidden)
        return hidden


class Passing(Skipping):
    """Every block uses a layer of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        for block in self.blocks:
            block.out.register_forward_hook(lambda module, args, output: self.shared(output))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden, _ = block(hidden)
        return self.head(hidden)


class Nested(Skipping):
    """Blocks are in lists of a list, as Funnel's, and single layers in a list of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList(nn.ModuleList([Block(), Block()]) for _ in range(2))
        self.ends = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.ends[0](self.embed(ids))
        for blocks in self.blocks:
            for block in blocks:
                hidden, _ = block(hidden)
        return self.ends[1](hidden)


class OnTheSide(Skipping):
    """Blocks leave something for later ones."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        left: dict[str, torch.Tensor] = {}
        hook = self.blocks[0].left.register_forward_hook(
            lambda module, args, output: left.update(value=output)
        )
        hidden, _ = self.blocks[0](hidden)
        hook.remove()
        hidden, _ = self.blocks[1](hidden)
        hidden, _ = self.blocks[2](hidden + left["value"])
        return hidden


def runner_of(model: nn.Module) -> Callable[[int], object]:
    ids = torch.randint(0, 20, (WINDOWS, 6), generator=torch.Generator().manual_seed(1))

    def run(window: int) -> object:
        with torch.no_grad():
            return model(ids[window : window + 1])

    return run


def every_layer(model: nn.Module) -> dict[str, str]:
    """Every linear layer under its own name."""
    return {name: name for name, part in model.named_modules() if isinstance(part, nn.Linear)}


def inputs_seen(model: nn.Module, drive: Callable[[], object]) -> dict[str, list[torch.Tensor]]:
    """The inputs of every linear layer while ``drive`` runs, as plain hooks see them."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].clone())
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    drive()
    for handle in handles:
        handle.remove()
    return seen


def test_every_layer_sees_in_turn_what_it_sees_in_the_whole_model() -> None:
    model = TwoStacks()
    run = runner_of(model)
    expected = inputs_seen(model, lambda: [run(window) for window in range(WINDOWS)])
    course = course_of(model, run, every_layer(model))
    blocks = [f"encoder.block.{n}" for n in range(3)] + [f"decoder.{n}" for n in range(3)]
    assert list(course.blocks) == blocks
    assert course.blocks["decoder.1"] == [f"decoder.1.{name}" for name in ("left", "right", "out")]
    assert course.others == []
    for block in [*model.decoder, *model.encoder["block"]]:
        assert block.calls == WINDOWS + 2
        block.calls = 0

    def in_turn() -> None:
        with BlockRunner(model, run, range(WINDOWS)) as runner:
            for name in blocks:
                assert list(runner.windows(name)) == [0, 1, 2]

    found = inputs_seen(model, in_turn)
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        assert all(torch.equal(*pair) for pair in zip(found[name], tensors, strict=True))
    for block in [*model.decoder, *model.encoder["block"]]:
        assert block.calls == WINDOWS  # and not once more for every block behind it
        assert "forward" not in vars(block)
    after = inputs_seen(model, lambda: run(0))
    assert all(torch.equal(after[name][0], expected[name][0]) for name in expected)


@pytest.mark.parametrize("kind", [Skipping, Repeating, OnTheSide])
def test_models_that_do_not_run_their_blocks_in_turn_are_found_out(kind) -> None:
    model = kind()
    layers = every_layer(model)
    called = [layer for layer in layers if kind is not Repeating or ".0." in layer]
    assert course_of(model, runner_of(model), layers) == Course({}, called)
    assert not any("forward" in vars(block) for block in model.blocks)


def test_layers_that_are_called_in_several_blocks_or_in_none_are_apart() -> None:
    model = Passing()
    course = course_of(model, runner_of(model), every_layer(model))
    assert course.others == ["shared", "head"]
    assert list(course.blocks) == ["blocks.0", "blocks.1", "blocks.2"]
    assert course.blocks["blocks.2"] == [f"blocks.2.{name}" for name in ("left", "right", "out")]


def test_a_list_of_lists_has_blocks_and_a_list_of_layers_has_none() -> None:
    model = Nested()
    course = course_of(model, runner_of(model), every_layer(model))
    assert list(course.blocks) == ["blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.1.1"]
    assert course.others == ["ends.0", "ends.1"]
    assert block_of(model, "blocks.1.0.left") == "blocks.1.0"
    assert block_of(model, "ends.0") is None


def layers(*names: str, full: bool = True) -> LayerInputs:
    return LayerInputs(dict.fromkeys(names, WIDTH), full=full)


def test_layers_that_share_an_input_are_found() -> None:
    model = Block()
    inputs = layers("left", "right", "out")
    rows = torch.randn(3, 1, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    outs: list[torch.Tensor] = []
    model.out.register_forward_pre_hook(lambda _, args: outs.append(args[0].clone()))
    with inputs.watched(model, every_layer(model)), torch.no_grad():
        for row in rows:
            model(row)
            inputs.end_window()
    (first, shared), (second, alone) = inputs.groups()
    assert (first, second) == (["left", "right"], ["out"])
    for moments, seen in ((shared, rows), (alone, torch.stack(outs))):
        flat = seen.reshape(-1, WIDTH).double()
        assert moments.tokens == 15
        torch.testing.assert_close(
            moments.value().double(), flat.T @ flat / 15, rtol=1e-5, atol=1e-7
        )


def test_equal_values_and_writes_in_place_are_no_shared_input() -> None:
    model = Block()
    inputs = layers("left", "right", "out", full=False)
    hidden = torch.ones(4, WIDTH)
    with inputs.watched(model, every_layer(model)), torch.no_grad():
        model.left(hidden)
        model.right(hidden.clone())
        hidden *= 2
        model.out(hidden)
        inputs.end_window()
    groups = inputs.groups()
    assert [names for names, _ in groups] == [["left"], ["right"], ["out"]]
    assert [float(moments.value()[0]) for _, moments in groups] == [1.0, 1.0, 4.0]


def test_memory_that_is_used_again_is_no_shared_input() -> None:
    model = Block()
    inputs = layers("left", "right", full=False)
    with inputs.watched(model, every_layer(model)), torch.no_grad():
        for scale, layer in ((1.0, model.left), (3.0, model.right)):
            layer(torch.full((64, WIDTH), scale))  # freed before the next one is made
        inputs.end_window()
    assert [float(moments.value()[0]) for _, moments in inputs.groups()] == [1.0, 9.0]


def test_a_layer_that_is_called_twice_has_the_moments_of_both_inputs() -> None:
    model = Block()
    inputs = layers("left", "right", "out", full=False)
    with inputs.watched(model, every_layer(model)), torch.no_grad():
        one, two = torch.ones(4, WIDTH), torch.full((2, WIDTH), 4.0)
        for layer in (model.left, model.right, model.out):
            layer(one)
        model.left(two)
        model.right(input=two)
        inputs.end_window()
    (both, sums), (single, alone) = inputs.groups()
    assert (both, single) == (["left", "right"], ["out"])
    assert (sums.tokens, alone.tokens) == (6, 4)
    assert sums.value().tolist() == [(4 + 2 * 16) / 6] * WIDTH
    assert alone.value().tolist() == [1.0] * WIDTH


def test_layers_that_are_never_called_are_left_out() -> None:
    model = Block()
    inputs = layers("left", "out")
    assert inputs.groups() == []
    with inputs.watched(model, every_layer(model)), torch.no_grad():
        model.left(torch.ones(1, WIDTH))
        inputs.end_window()
    assert [names for names, _ in inputs.groups()] == [["left"]]


def test_layers_must_be_used_alike_in_every_window() -> None:
    model = Block()
    inputs = layers("left", "right")
    with inputs.watched(model, every_layer(model)), torch.no_grad():
        rows = torch.ones(2, WIDTH)
        model.left(rows)
        model.right(rows)
        inputs.end_window()
        model.left(rows)
        model.right(rows.clone())
        with pytest.raises(UnsupportedInputError, match="right is used in different ways"):
            inputs.end_window()


def test_what_is_not_finite_or_of_another_width_names_the_layer() -> None:
    model = nn.ModuleDict({"left": nn.Linear(WIDTH, WIDTH), "right": nn.Identity()})
    inputs = layers("left", "right")
    each = {name: name for name in ("left", "right")}
    with inputs.watched(model, each), torch.no_grad():
        with pytest.raises(NonFiniteActivationError, match="left: the inputs hold NaN or Inf"):
            model["left"](torch.full((2, WIDTH), torch.inf))
        with pytest.raises(UnsupportedInputError, match="right: its inputs have 3 features"):
            model["right"](torch.ones(2, 3))
