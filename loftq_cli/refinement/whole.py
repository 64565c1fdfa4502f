"""The whole model, trained end to end where it fits: every matrix at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loftq_cli.calibration.outputs import called, checkpointed, predicts
from loftq_cli.checkpoint.stored import Stored
from loftq_cli.machine.observer import Observer
from loftq_cli.machine.world import World
from loftq_cli.refinement.block import Course, train
from loftq_cli.refinement.distill import Hold, Told, distance, told
from loftq_cli.refinement.model import Prepared
from loftq_cli.refinement.stages import Stages

TITLE = "end to end"
_OPTION = "--end-to-end"


@dataclass(frozen=True)
class Whole:
    """What the original says of the windows of ``course``, and how the model is trained to say the
    same; ``blocks`` keep no activations but their inputs. ``cost``: what a window takes, in those
    of a block. The processes of ``world`` share the windows."""

    prepared: Prepared
    known: Mapping[int, Told]
    blocks: Sequence[str]
    course: Course
    cost: int
    world: World

    def refine(self, begun: Stored, stages: Stages, observer: Observer) -> dict[str, Any]:
        """Train every matrix, from what is stored of finished blocks on, unless that is finished;
        its record."""
        conversion, names = self.prepared.conversion, list(self.prepared.calibration.layers)
        specs = [spec for name in names for spec in conversion.held[name].specs]
        observer.working_on(TITLE)
        record = stages.record(TITLE, specs)
        if record is not None:
            observer.advance(self.course.amount * self.cost)
            return record
        model = self.prepared.model
        call = called(model, self.prepared.device, _OPTION)

        def loss_of(window: int) -> torch.Tensor:
            with self.prepared.autocast():
                output = call(self.prepared.windows[window][None])
            return distance(output, [self.known[window]])

        begins = {name: stages.begun(conversion.held[name].specs, begun) for name in names}
        placed = self.prepared.placed(names, self.course.rates, begins)
        blocks = [model.get_submodule(name) for name in self.blocks]
        with self.prepared.narrowed(names), checkpointed(blocks):
            outcome = train(
                placed,
                loss_of,
                self.course,
                self.world,
                lambda windows: observer.advance(windows * self.cost),
            )
        tensors: dict[str, torch.Tensor] = {}
        for item in placed:
            name = item.matrix.name
            tensors |= conversion.held[name].encoded(item.latent, conversion.stored(name))
        record = outcome.record(TITLE)
        stages.write(TITLE, tensors, specs, record)
        return record


@torch.no_grad()
def known_of(
    prepared: Prepared, windows: Iterable[int], hold: Hold, advance: Callable[[], None]
) -> dict[int, Told]:
    """What the original says of ``windows``, by their numbers, kept by ``hold``. ``advance`` is
    called for each."""
    call, logits = called(prepared.model, prepared.device, _OPTION), predicts(prepared.model)
    found = {}
    with prepared.narrowed(list(prepared.calibration.layers)):
        for window in windows:
            with prepared.autocast():
                output = call(prepared.windows[window][None])[0]
            found[window] = told(output, hold, logits=logits)
            advance()
    return found
