"""One block, trained to give what the original's gives; what does not help is not kept."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from loftq_cli.refinement.training import Placed, Rates, Trainer

_FLOOR = 1e-3
"""Of the energy of a token in the middle: what those of smaller ones are taken for, at least."""

_NOTHING = 1e-20  # of a text of zeros

_PROBED = 8

LossOf = Callable[[Sequence[int]], torch.Tensor]
"""The mean loss of some windows, which can be differentiated."""


@dataclass(frozen=True)
class Course:
    """How something is trained: ``steps`` of ``batch`` windows each, out of the ``trained`` ones in
    an order that ``seed`` decides, ``together`` of them at once. The ``held`` ones decide, after
    every ``pace`` steps, what is kept."""

    trained: Sequence[int]
    held: Sequence[int]
    steps: int
    batch: int
    together: int
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

    @property
    def used(self) -> list[int]:
        """The windows that are worked through or looked at."""
        return sorted({*itertools.chain(*self.batches()), *self.held, *self.probed})

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
    advance: Callable[[int], None],
) -> Outcome:
    """Train ``placed``, and leave in them what had the least loss of the held windows, or what they
    were. ``advance`` is told of the windows that were worked through."""
    with Trainer(placed, course.rates, course.steps) as trainer:
        start = trainer.snapshot()
        measure = functools.partial(_mean, loss_of, course.together)
        held_before, before = measure(course.held), measure(course.probed)
        best, least, kept, done = start, held_before, 0, 0
        finite = math.isfinite(held_before + before)
        for windows in course.batches() if finite else ():
            finite = _step(trainer, loss_of, windows, course.together)
            advance(len(windows))
            done += 1
            if finite and (done % course.pace == 0 or done == course.steps):
                held = measure(course.held)
                finite = math.isfinite(held)
                if held < least:
                    best, least, kept = trainer.snapshot(), held, done
            if not finite:  # what came before it was on the way there
                best, least, kept = start, held_before, 0
                break
        trainer.restore(best)
        after = measure(course.probed) if kept else before
    return Outcome(before, after, held_before, least, kept, done, finite)


def _step(trainer: Trainer, loss_of: LossOf, windows: Sequence[int], together: int) -> bool:
    """One step by the mean loss of ``windows``; whether it is finite, else none is made."""
    losses = []
    for part in _parts(windows, together):
        loss = loss_of(part) * (len(part) / len(windows))
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    finite = math.isfinite(sum(torch.stack(losses).tolist()))  # a device is waited for once
    if finite:
        trainer.step()
    return finite


@torch.no_grad()
def _mean(loss_of: LossOf, together: int, windows: Sequence[int]) -> float:
    parts = _parts(windows, together)
    if not parts:
        return 0.0
    losses = torch.stack([loss_of(part) for part in parts]).tolist()
    total = math.fsum(loss * len(part) for loss, part in zip(losses, parts, strict=True))
    return total / len(windows)


def _parts(windows: Sequence[int], together: int) -> list[Sequence[int]]:
    return [windows[at : at + together] for at in range(0, len(windows), together)]
