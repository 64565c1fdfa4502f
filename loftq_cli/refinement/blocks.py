"""Block after block: the original's output, the refined block's training, and then its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loftq_cli.calibration.blockwise import fresh, resident
from loftq_cli.machine.observer import Observer
from loftq_cli.machine.world import World
from loftq_cli.refinement.block import Course, main_output, token_loss, train
from loftq_cli.refinement.chains import ORIGINAL, REFINED, Chains
from loftq_cli.refinement.model import Prepared
from loftq_cli.refinement.stages import Stages


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model, by name, with the matrices in each, to be refined in turn over
    ``course``, whose windows the processes of ``world`` share."""

    prepared: Prepared
    matrices: Mapping[str, Sequence[str]]
    course: Course
    world: World

    def refine(self, chains: Chains, stages: Stages, observer: Observer) -> list[dict[str, Any]]:
        """Refine what is not finished; what each block's record says, in turn."""
        return [self._refine(name, chains, stages, observer) for name in self.matrices]

    def _refine(
        self, name: str, chains: Chains, stages: Stages, observer: Observer
    ) -> dict[str, Any]:
        conversion, names = self.prepared.conversion, self.matrices[name]
        specs = [spec for each in names for spec in conversion.held[each].specs]
        observer.working_on(name)
        block = self.prepared.model.get_submodule(name)
        with resident(block), self.prepared.narrowed(names):
            wanted = self._outputs(name, ORIGINAL, chains)
            record = stages.record(name, specs) if names else {"name": name}
            if record is None:
                record = self._train(name, chains, wanted, stages, observer)
            else:
                observer.skip(self.amount(name))
            if names:
                observer.finished(_told(record))
            stored = stages.stored([name] if names else [])
            for each in names:
                held = conversion.held[each]
                self.prepared.put(each, held.decoded(stages.read(held.specs, stored)))
            refined = self._outputs(name, REFINED, chains)
            chains.finish(name, {ORIGINAL: wanted, REFINED: refined})
        return record

    def _outputs(self, name: str, chain: str, chains: Chains) -> dict[int, Any]:
        with self.prepared.autocast():
            return chains.outputs(name, chain)

    def amount(self, name: str) -> int:
        """How many windows are worked through to refine a block."""
        return self.course.amount if self.matrices[name] else 0

    def _train(
        self,
        name: str,
        chains: Chains,
        wanted: Mapping[int, Any],
        stages: Stages,
        observer: Observer,
    ) -> dict[str, Any]:
        block = self.prepared.model.get_submodule(name)
        conversion, names = self.prepared.conversion, self.matrices[name]
        placed = self.prepared.placed(names, self.course.rates)

        def loss_of(window: int) -> torch.Tensor:
            args, kwargs = chains.given(name, REFINED, window)
            with self.prepared.autocast():
                found = main_output(block(*args, **kwargs))
            return token_loss(found, main_output(fresh(wanted[window])))

        outcome = train(placed, loss_of, self.course, self.world, observer.advance)
        tensors: dict[str, torch.Tensor] = {}
        for item in placed:
            held, own = conversion.held[item.matrix.name], conversion.stored(item.matrix.name)
            tensors |= held.encoded(item.latent, own)
        record = outcome.record(name)
        specs = [spec for each in names for spec in conversion.held[each].specs]
        stages.write(name, tensors, specs, record)
        return record


def _told(record: Mapping[str, Any]) -> str:
    """A block's losses in few words; nothing if one was not finite."""
    losses = [record["held_before"], record["held_after"]]
    if None in losses:
        return ""
    return f"loss of the last {' -> '.join(f'{loss:.3g}' for loss in losses)}"
