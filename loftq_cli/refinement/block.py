"""One block, trained to give what the original's gives; what does not help is not kept."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from loftq_cli.machine.world import World
from loftq_cli.refinement.training import Placed, Rates, Trainer

_FLOOR = 1e-3
"""Of the energy of a token in the middle: what those of smaller ones are taken for, at least."""

_NOTHING = 1e-20  # of a text of zeros

_PROBED = 8

LossOf = Callable[[int], torch.Tensor]
"""The loss of a window, which can be differentiated."""


@dataclass(frozen=True)
class Course:
    """How something is trained: ``steps`` of ``batch`` windows each, out of the ``trained`` ones in
    an order that ``seed`` decides. The ``held`` ones decide, after every ``pace`` steps, what is
    kept."""

    trained: Sequence[int]
    held: Sequence[int]
    steps: int
    batch: int
    pace: int
    rates: Rates
    seed: int

    def batches(self) -> Iterator[list[int]]:
        """The windows of each step: all of them before one comes again."""
        generator = torch.Generator().manual_seed(self.seed)
        left: list[int] = []
        for _ in range(self.steps):
            if len(left) < self.batch:
                order = torch.randperm(len(self.trained), generator=generator).tolist()
                left += [self.trained[number] for number in order]
            yield left[: self.batch]
            left = left[self.batch :]

    @property
    def probed(self) -> Sequence[int]:
        """Trained windows to tell their loss by."""
        return self.trained[: min(len(self.held), _PROBED)]

    def used(self, world: World) -> list[int]:
        """The windows that this process works through or looks at."""
        of_steps = (part(windows, world) for windows in self.batches())
        looked_at = world.share(self.held), world.share(self.probed)
        return sorted({*itertools.chain(*of_steps, *looked_at)})

    @property
    def amount(self) -> int:
        """How many windows are worked through."""
        return self.steps * self.batch


@dataclass(frozen=True)
class Outcome:
    """Losses before and after, of trained windows and of held ones; ``kept``: after how many of
    ``steps`` it was kept as it was then, 0: as it was before. ``finite`` False: a loss was not, and
    it was left."""

    before: float
    after: float
    held_before: float
    held_after: float
    kept: int
    steps: int
    finite: bool

    def record(self, name: str) -> dict[str, Any]:
        """What the manifest says of it; None for a loss that is not finite."""
        told = {key: _told(value) for key, value in asdict(self).items()}
        return {"name": name, **told}


def _told(value: float) -> float | None:
    return value if math.isfinite(value) else None


def main_output(value: Any) -> torch.Tensor:
    """The hidden states among what a block gives: its output, or the first of several."""
    found: torch.Tensor = value[0] if isinstance(value, (tuple, list)) else value
    return found


def token_loss(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The mean over tokens of the squared error relative to a token's energy: some tokens are
    thousands of times as large as the others, and would decide alone."""
    wanted = wanted.to(found.device).float()
    errors = (found.float() - wanted).square().sum(dim=-1)
    energies = wanted.square().sum(dim=-1)
    floor = _FLOOR * energies.median() + _NOTHING
    return (errors / (energies + floor)).mean()


def train(
    placed: Sequence[Placed],
    loss_of: LossOf,
    course: Course,
    world: World,
    advance: Callable[[int], None],
) -> Outcome:
    """Train ``placed``, and leave in them what had the least loss of the held windows, or what they
    were; from there it goes on in shorter steps if the loss does not fall. The processes of
    ``world`` share the windows of every step, and all come to the same. ``advance`` is told of the
    windows that were worked through."""
    with Trainer(placed, course.rates, course.steps) as trainer:
        start = trainer.snapshot()
        measure = functools.partial(_mean, loss_of, world)
        held_before, before = measure(course.held), measure(course.probed)
        best, least, kept, done = start, held_before, 0, 0
        finite = math.isfinite(held_before + before)
        for windows in course.batches() if finite else ():
            finite = _step(trainer, placed, loss_of, windows, world)
            advance(len(windows))
            done += 1
            if finite and (done % course.pace == 0 or done == course.steps):
                held = measure(course.held)
                finite = math.isfinite(held)
                if held < least:
                    best, least, kept = trainer.snapshot(), held, done
                else:
                    trainer.back_to(best)
            if not finite:  # what came before it was on the way there
                best, least, kept = start, held_before, 0
                break
        trainer.restore(best)
        after = measure(course.probed) if kept else before
    return Outcome(before, after, held_before, least, kept, done, finite)


def halves(windows: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """What gradients are summed of, each by itself and then the two, so that sums are the same
    however many processes share the windows."""
    middle = (len(windows) + 1) // 2
    return windows[:middle], windows[middle:]


def part(windows: Sequence[int], world: World) -> Sequence[int]:
    """Those of a step's windows that this process works through: all of them, a half, or a half of
    a half."""
    rank, size = world.rank, world.size
    while size > 1:
        size //= 2
        windows = halves(windows)[rank // size]
        rank %= size
    return windows


def _step(
    trainer: Trainer,
    placed: Sequence[Placed],
    loss_of: LossOf,
    windows: Sequence[int],
    world: World,
) -> bool:
    """One step by the mean loss of ``windows``; whether it is finite, else none is made."""
    share = 1 / len(windows)
    losses = _gradients(placed, loss_of, part(windows, world), share)
    total = sum(torch.stack(losses).tolist())  # a device is waited for once
    finite = all(world.gathered(math.isfinite(total)))
    if finite:
        gradients = (item.gradient for item in placed)
        world.add_halves([gradient for gradient in gradients if gradient is not None])
        trainer.step()
    return finite


def _gradients(
    placed: Sequence[Placed], loss_of: LossOf, windows: Sequence[int], share: float
) -> list[torch.Tensor]:
    """Leave with ``placed`` the gradients of the loss of ``windows``, each of which counts for
    ``share``; the losses."""
    if len(windows) > 2:
        first, second = halves(windows)
        losses = _gradients(placed, loss_of, first, share)
        sums = [item.give_up() for item in placed]
        losses += _gradients(placed, loss_of, second, share)
        for item, gradient in zip(placed, sums, strict=True):
            if gradient is not None:
                item.add(gradient)
        return losses
    losses = []
    for window in windows:  # the gradient of the second is added to that of the first
        loss = loss_of(window) * share
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    return losses


@torch.no_grad()
def _mean(loss_of: LossOf, world: World, windows: Sequence[int]) -> float:
    """The mean loss of ``windows``, which all processes share; 0 if there are none."""
    losses = [loss_of(window) for window in world.share(windows)]
    found = world.gathered(torch.stack(losses).tolist() if losses else [])
    return math.fsum(itertools.chain(*found)) / max(1, len(windows))
