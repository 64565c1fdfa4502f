"""What a block is trained by, and what of it is kept."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from loftq_cli.layouts.base import Matrix
from loftq_cli.machine.world import ALONE, World
from loftq_cli.numerics.latent import Fixed, Pair
from loftq_cli.refinement.block import Course, Outcome, part, token_loss, train
from loftq_cli.refinement.training import Placed, Rates, schedule
from tests.support.quantizing import gaussian

COURSE = Course(
    trained=[0, 1, 3, 4],
    held=[2],
    steps=40,
    batch=2,
    pace=4,
    rates=Rates(pair=0.05, scales=0.0, codes=0.0),
    seed=0,
)


def test_a_token_s_error_counts_relative_to_its_energy() -> None:
    wanted, found = gaussian(2, 5, 8), gaussian(2, 5, 8, seed=1)
    wanted[0, 0] *= 1e4  # a massive activation
    expected = [
        float((f - w).square().sum() / w.square().sum())
        for f, w in zip(found.double().view(-1, 8), wanted.double().view(-1, 8), strict=True)
    ]
    assert float(token_loss(found, wanted)) == pytest.approx(sum(expected) / 10, rel=0.02)
    assert float(token_loss(wanted, wanted)) == 0.0
    assert math.isfinite(float(token_loss(found, torch.zeros_like(found))))


def test_every_window_comes_before_one_comes_again() -> None:
    batches = list(replace(COURSE, steps=6, batch=3).batches())
    assert [len(batch) for batch in batches] == [3] * 6
    seen = [window for batch in batches for window in batch]
    for start in range(0, 16, 4):
        assert sorted(seen[start : start + 4]) == COURSE.trained
    assert list(replace(COURSE, seed=1).batches()) != list(COURSE.batches())
    assert list(COURSE.batches()) == list(COURSE.batches())


def test_rates_rise_and_then_fall() -> None:
    shares = [schedule(step, 100) for step in range(100)]
    assert shares[0] < shares[2] < shares[4] == max(shares)
    assert shares[4:] == sorted(shares[4:], reverse=True)
    assert min(shares[10:]) >= 0.02
    assert schedule(0, 1) > 0


class Line:
    """A matrix of 4 x 4 that is to map windows of a vector each to what ``wanted`` maps them to;
    everything in a ``unit``."""

    def __init__(self, unit: float = 1.0) -> None:
        self.parameter = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
        pair = Pair(gaussian(4, 4) * math.sqrt(unit), torch.zeros(4, 4), 1.0)
        matrix = Matrix("weight", (4, 4), "F32", "uniform", 2, 64)
        self.placed = [Placed(matrix, Fixed(torch.zeros(4, 4), pair), self.parameter)]
        self.wanted = gaussian(4, 4, seed=2) * unit
        self.inputs = gaussian(10, 7, 4, seed=3)
        self.seen: list[int] = []

    def loss_of(self, window: int) -> torch.Tensor:
        self.seen.append(window)
        inputs = self.inputs[window]
        return (inputs @ (self.parameter - self.wanted).T).square().mean()


def test_training_lowers_the_loss_and_tells_of_it() -> None:
    line = Line()
    advanced: list[int] = []
    outcome = train(line.placed, line.loss_of, COURSE, ALONE, advanced.append)
    assert outcome.finite
    assert outcome.kept == outcome.steps == 40
    assert outcome.held_after < 0.2 * outcome.held_before
    with torch.no_grad():
        assert float(line.loss_of(2)) == pytest.approx(outcome.held_after)
    assert advanced == [2] * 40
    assert {*line.seen} == {0, 1, 2, 3, 4}
    assert not line.parameter.requires_grad
    assert line.parameter.grad is None


def test_gradients_of_narrow_weights_are_summed_in_float32() -> None:
    """256 and 1 are 257, which bfloat16 has no value for."""
    item = Line().placed[0]
    item.parameter.data = item.parameter.data.bfloat16()
    item.parameter.requires_grad_()
    item.parameter.register_post_accumulate_grad_hook(item.take)
    for factor in (256.0, 1.0, 1.0):
        (item.parameter * factor).sum().backward()
    assert item.parameter.grad is None
    found = item.give_up()
    assert found is not None
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.full((4, 4), 258.0))
    assert item.give_up() is None


@pytest.mark.parametrize("unit", [2.0**-12, 2.0**8])
def test_how_large_weights_are_makes_no_difference(unit: float) -> None:
    found = []
    for line in (Line(), Line(unit)):
        outcome = train(line.placed, line.loss_of, COURSE, ALONE, lambda count: None)
        found.append((outcome.kept, outcome.held_after / outcome.held_before, line.parameter))
    (kept, left, plain), (as_many, as_much, scaled) = found
    assert as_many == kept
    assert as_much == pytest.approx(left, rel=1e-3)
    torch.testing.assert_close(scaled, plain * unit, rtol=1e-2, atol=1e-3 * unit)


class Threads(World):
    """Processes that are threads: ``said`` is where each lays what the others are to see."""

    def __init__(self, rank: int, said: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(said)
        self.said, self.barrier = said, barrier

    def gathered(self, value: Any) -> list[Any]:
        self.said[self.rank] = value
        self.barrier.wait()
        found = list(self.said)
        self.barrier.wait()
        return found

    def add_halves(self, tensors: Sequence[torch.Tensor]) -> None:
        distance = 1
        while distance < self.size:
            theirs = self.gathered([tensor.clone() for tensor in tensors])[self.rank ^ distance]
            for tensor, other in zip(tensors, theirs, strict=True):
                tensor.add_(other)
            distance *= 2


def trained_by(count: int, course: Course) -> list[tuple[Line, Outcome]]:
    """What each of so many processes has and says after they have trained together."""
    said, barrier = [None] * count, threading.Barrier(count)
    found: dict[int, tuple[Line, Outcome]] = {}

    def work(rank: int) -> None:
        line, world = Line(), Threads(rank, said, barrier)
        outcome = train(line.placed, line.loss_of, course, world, lambda count: None)
        found[rank] = line, outcome

    workers = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    return [found[rank] for rank in range(count)]


@pytest.mark.parametrize("batch", [3, 4])
def test_several_processes_come_to_the_bits_of_one(batch: int) -> None:
    course = replace(COURSE, trained=[0, 1, 3, 4, 5, 6, 7], held=[2, 8, 9], batch=batch)
    ((line, outcome),) = trained_by(1, course)
    assert outcome.kept > 0
    for count in (2, 4)[: batch - 2]:
        for rank, (other, told) in enumerate(trained_by(count, course)):
            assert torch.equal(other.parameter, line.parameter)
            assert told == outcome
            world = Threads(rank, [None] * count, threading.Barrier(count))
            assert {*other.seen} == {*course.used(world)}
            assert len(other.seen) < 0.7 * len(line.seen)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("windows", [[7, 3, 5, 1], [7, 3, 5, 1, 2]])
def test_the_windows_of_a_step_are_dealt_out(windows: list[int], count: int) -> None:
    barrier = threading.Barrier(count)
    parts = [part(windows, Threads(rank, [None] * count, barrier)) for rank in range(count)]
    assert [window for each in parts for window in each] == windows
    assert min(map(len, parts)) >= 1


def test_what_does_not_help_is_not_kept() -> None:
    line = Line()

    def loss_of(window: int) -> torch.Tensor:
        """Of the held window, how far the matrix is from what it was."""
        return line.parameter.square().mean() if window == 2 else line.loss_of(window)

    outcome = train(line.placed, loss_of, COURSE, ALONE, lambda count: None)
    assert (outcome.kept, outcome.finite) == (0, True)
    assert outcome.held_after == outcome.held_before == 0.0
    assert outcome.after == outcome.before
    assert not line.parameter.any()


def test_the_best_on_the_way_is_kept_and_not_the_last() -> None:
    line, calls = Line(), []

    def loss_of(window: int) -> torch.Tensor:
        if window != 2:
            return line.loss_of(window)
        calls.append(line.parameter.detach().clone())
        return line.loss_of(window) * 0 + abs(len(calls) - 4.0)  # least at the third look

    outcome = train(line.placed, loss_of, COURSE, ALONE, lambda count: None)
    assert outcome.kept == 3 * COURSE.pace
    assert torch.equal(line.parameter, calls[3])


@pytest.mark.parametrize("rate", [10.0, 100.0])
def test_steps_that_go_too_far_are_taken_again_in_shorter_ones(rate: float) -> None:
    line, course = Line(), replace(COURSE, rates=Rates(pair=rate, scales=0.0, codes=0.0))
    outcome = train(line.placed, line.loss_of, course, ALONE, lambda count: None)
    assert outcome.held_after < 0.1 * outcome.held_before


@pytest.mark.parametrize("after", [0, 1, 9, 20])
def test_a_loss_that_is_not_finite_leaves_everything_as_it_was(after: int) -> None:
    line = Line()

    def loss_of(window: int) -> torch.Tensor:
        loss = line.loss_of(window)
        return loss * math.nan if len(line.seen) > after else loss

    outcome = train(line.placed, loss_of, COURSE, ALONE, lambda count: None)
    assert (outcome.kept, outcome.finite) == (0, False)
    assert not line.parameter.any()
    assert all(
        value is None or math.isfinite(value)
        for key, value in outcome.record("x").items()
        if key != "name"
    )
