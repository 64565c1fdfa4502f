"""A refinement that is settled: what is left of it done, and its files written."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch

from loftq_cli.calibration.blockwise import kept
from loftq_cli.calibration.course import Course as BlockOrder
from loftq_cli.calibration.text_file import Text
from loftq_cli.checkpoint.journal import Journal, Subject
from loftq_cli.checkpoint.output import MANIFEST
from loftq_cli.errors import InputError, UnsupportedInputError
from loftq_cli.machine.durable import explained, pretty_json, write_file
from loftq_cli.machine.observer import Observer
from loftq_cli.machine.peak_memory import peak_host_bytes
from loftq_cli.machine.resources import available_memory, memory_explained
from loftq_cli.machine.world import World
from loftq_cli.refinement.block import Course
from loftq_cli.refinement.blocks import Blocks
from loftq_cli.refinement.chains import Chains, Keep, in_evaluation, on_disk, spilling
from loftq_cli.refinement.conversion import Conversion
from loftq_cli.refinement.model import Prepared, prepared
from loftq_cli.refinement.room import fits, size_of_conversion
from loftq_cli.refinement.settings import BATCH, BLOCK_RATES, PACE, WHOLE_RATES, Refining
from loftq_cli.refinement.stages import RefineWorkspace, Stages
from loftq_cli.refinement.whole import TITLE, Whole, known_of
from loftq_cli.refinement.writing import manifest_of, write_files

_OF_TRAINING = 4
"""A window that is looked at takes the time of one that is trained on, divided by this."""
_LESS_MEMORY = "lower --length, or use another --device"
_SHARE = 0.25
"""Of the free memory that activations may take; beyond it they go to the disk."""


@dataclass(frozen=True)
class Run:
    """A refinement of ``conversion``; ``subject``: what the journal says that it is of. The
    processes of ``world`` share the windows, and rank 0 writes."""

    conversion: Conversion
    texts: Sequence[Text]
    wanted: Refining
    device: torch.device
    subject: Subject
    observer: Observer
    world: World

    def assist(self, workspace: RefineWorkspace) -> None:
        """Do what is left, together with rank 0; of the others."""
        with memory_explained("refining", hint=_LESS_MEMORY), workspace.folder(self.world) as own:
            self._refined(own, own, Stages(workspace.stages, None, self.world))

    def write(self, workspace: RefineWorkspace, started: float) -> dict[str, Any]:
        """Do what is left, and write every file of the output; its manifest. Of rank 0."""
        with memory_explained("refining", hint=_LESS_MEMORY):
            with (
                Journal(workspace.journal, self.subject) as journal,
                workspace.folder(self.world) as own,
            ):
                with explained(workspace.output):
                    workspace.output.mkdir(exist_ok=True)
                stages = Stages(workspace.stages, journal, self.world)
                told, titles = self._refined(own, workspace.output, stages)
            refined = stages.stored(titles)
            with explained(workspace.output):
                write_files(self.conversion, refined, workspace.output, workspace.final)
            environment = {
                "torch": torch.__version__,
                "device": str(self.device),
                "seconds": round(time.monotonic() - started, 3),
                "peak_host_bytes": peak_host_bytes(),
                "peak_device_bytes": _peak(self.device),
            }
            manifest = manifest_of(
                self.conversion,
                refined,
                told,
                self.subject.fingerprint,
                environment,
                workspace.output,
            )
        write_file(workspace.output / MANIFEST, pretty_json(manifest))
        return manifest

    def _refined(
        self, folder: Path, offloaded: Path, stages: Stages
    ) -> tuple[dict[str, Any], list[str]]:
        """What the manifest says of the refinement, and which stages hold what is new.
        ``offloaded``: where parts of the model may lie; ``folder``: where what is computed may."""
        texts = [text.content for text in self.texts]
        ready = prepared(self.conversion, texts, self.wanted, self.device, offloaded)
        if len(ready.trained) < self.world.size:
            raise InputError(
                f"the text: {len(ready.trained)} windows to train on, for {self.world.size} "
                "processes",
                hint="give more text, lower --length, or start fewer processes",
            )
        with in_evaluation(ready.model):
            order = BlockOrder(**self.world.told(lambda: asdict(ready.order())))
            blocks = {
                block: [name for name in names if name in self.conversion.held]
                for block, names in order.blocks.items()
            }
            if self.wanted.epochs and not any(blocks.values()) and not self.wanted.end_to_end:
                raise UnsupportedInputError(
                    f"{self.conversion.original.directory}: its blocks do not run in turn",
                    hint="use --end-to-end STEPS",
                )
            keep = self._keep(ready, folder)
            records, end = [], None
            course, end_course = self._block_course(ready), self._whole_course(ready)
            used = end_course.used(self.world) if self.wanted.end_to_end else ()
            count = sum(map(bool, blocks.values())) if self.wanted.epochs else 0
            cost = max(1, count)
            looked = max(1, cost // _OF_TRAINING)
            again = [] if self._keeps_everything(ready) else list(blocks)
            total = course.amount * count + len(used) * looked + end_course.amount * cost
            self.observer.begin(total, "refining", " windows")
            if count:
                self.observer.count(count, "blocks")
            try:
                hold = on_disk(folder)
                advance = self.observer.advance
                known = known_of(ready, used, hold, lambda: advance(looked)) if used else {}
                whole = Whole(ready, known, again, end_course, cost, self.world)
                if self.wanted.epochs:
                    own = course.used(self.world)
                    with Chains(ready.model, ready.calibration.run, own, keep) as chains:
                        work = Blocks(ready, blocks, course, self.world)
                        records = work.refine(chains, stages, self.observer)
                titles = [record["name"] for record in records if len(record) > 1]
                if self.wanted.end_to_end:
                    end = whole.refine(stages.stored(titles), stages, self.observer)
                    titles.append(TITLE)
            finally:
                self.observer.end()
        samples, length = ready.windows.shape
        self._tell_of_nan([*records, *([] if end is None else [end])])
        told = {
            "texts": [text.sha256 for text in self.texts],
            "adapter": self.subject.recipe["adapter"],
            "settings": self.wanted.described(),
            "samples": samples,
            "length": length,
            "tokens": samples * length,
            "held": len(ready.held),
            "blocks": [record for record in records if len(record) > 1],
            **({} if end is None else {"end_to_end": end}),
        }
        return told, titles

    def _tell_of_nan(self, records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:
            if not record.get("finite", True):
                self.observer.note(f"{record['name']}: a loss was not finite; it stays as it was")

    def _keep(self, ready: Prepared, folder: Path) -> Keep:
        """Where the activations of both chains go: three times as many as one block gives."""
        width = getattr(ready.model.config, "hidden_size", None) or 4096
        nbytes = 3 * ready.windows.numel() * int(width) * 4
        room = available_memory(torch.device("cpu"), swap=False)
        # Of several processes each keeps the fewer windows, the more of them share a host.
        if room is None or nbytes < _SHARE * room:
            return kept
        return spilling(folder)

    def _keeps_everything(self, ready: Prepared) -> bool:
        """Whether there is memory for what is computed inside all blocks."""
        size, length = size_of_conversion(self.conversion), ready.windows.shape[1]
        return fits(size.whole_memory(length) + size.activations(length), self.device)

    def _block_course(self, ready: Prepared) -> Course:
        pace = ceil(len(ready.trained) / BATCH)
        steps = (self.wanted.epochs or 0) * pace
        return Course(ready.trained, ready.held, steps, BATCH, pace, BLOCK_RATES, self.wanted.seed)

    def _whole_course(self, ready: Prepared) -> Course:
        steps = self.wanted.end_to_end or 0
        return Course(ready.trained, ready.held, steps, BATCH, PACE, WHOLE_RATES, self.wanted.seed)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
