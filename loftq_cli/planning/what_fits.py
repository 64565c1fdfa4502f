"""``loftq plan``: what a model would take in several settings, and the best of those that fit."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loftq_cli.checkpoint.request import Request
from loftq_cli.checkpoint.source import Source
from loftq_cli.errors import LayoutError, UsageError
from loftq_cli.layouts import registry
from loftq_cli.numerics.quantizers import methods
from loftq_cli.planning.budget import file_bytes
from loftq_cli.planning.make import make_plan
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.training_memory import Steps, Training, TrainingMemory, training_memory
from loftq_cli.settings.options import Options

OPTIONS = {"length": "--length", "batch": "--batch"}
DEFAULT_RANKS = (16, 64)
_PART = 0.75  # of memory that weights and adapter may take, where activations are not known

YES, CHECKPOINTED, PERHAPS, NO = "yes", "with checkpointing", "perhaps", "no"
"""Whether a setting fits: without gradient checkpointing, with it, if activations take a quarter at
most, or not."""
_FITTING = (YES, CHECKPOINTED, PERHAPS)


@dataclass(frozen=True)
class Grid:
    """The settings to look at, in every combination; nothing: the usual ones."""

    bits: Sequence[int] = ()
    ranks: Sequence[int] = ()
    layouts: Sequence[str] = ()


@dataclass(frozen=True)
class _Row:
    """One setting: what was asked for, its plan, and what that takes."""

    bits: int
    rank: int
    layout: str
    plan: Plan
    memory: TrainingMemory

    def fits(self, room: int | None) -> str | None:
        if room is None:
            return None
        taken = self.memory
        for step, verdict in ((taken.step, YES), (taken.checkpointed, CHECKPOINTED)):
            found = taken.training(step)
            if found is not None and found <= room:
                return verdict
        if taken.least is None and taken.known <= _PART * room:
            return PERHAPS
        return NO

    def described(self, room: int | None) -> dict[str, Any]:
        plan, taken = self.plan, self.memory
        return {
            "bits": self.bits,
            "rank": self.rank,
            "layout": plan.layout.name,
            "method": next(iter(plan.matrices.values())).matrix.method,
            "bits_per_weight": plan.bits_per_weight,
            "disk_bytes": file_bytes(plan),
            "load_bytes": taken.loaded,
            "weights_bytes": taken.weights,
            "adapter_bytes": taken.adapter,
            "gradients_bytes": taken.gradients,
            "optimizer_bytes": taken.optimizer,
            "activations_bytes": _activations(taken.step, taken),
            "checkpointed_activations_bytes": _activations(taken.checkpointed, taken),
            "train_bytes": taken.training(taken.step),
            "checkpointed_train_bytes": taken.training(taken.checkpointed),
            "fits": self.fits(room),
        }


def _activations(step: int | None, taken: TrainingMemory) -> int | None:
    return None if step is None else max(0, step - taken.gradients)


def what_fits(
    source: Source, request: Request, memory: int | None, training: Training, grid: Grid
) -> dict[str, Any]:
    """What ``loftq plan --json`` prints of ``source``, which ``request`` names. ``memory``: bytes
    there are.

    Raises UsageError for settings that are none, LayoutError if no layout that was asked for can
    hold the model, and what :func:`loftq_cli.planning.make.make_plan` raises.
    """
    training = training.settled(source, OPTIONS)
    rows, refused = _rows(source, training, grid)
    rows.sort(key=lambda row: (row.bits, row.rank))
    fitting = [row for row in rows if row.fits(memory) in _FITTING]
    best = max(fitting, key=lambda row: (row.bits, row.rank), default=None)
    return {
        "source": {"id": source.id, "revision": source.revision},
        "parameters": rows[0].plan.parameters,
        "memory_bytes": memory,
        "length": training.length,
        "batch": training.batch,
        "dtype": training.dtype,
        "rows": [row.described(memory) for row in rows],
        "refused": refused,
        "unknown": next((row.memory.unknown for row in rows if row.memory.unknown), None),
        "best": None if best is None else best.described(memory),
        "command": None if best is None else _command(request, best),
    }


def _rows(
    source: Source, training: Training, grid: Grid
) -> tuple[list[_Row], list[dict[str, Any]]]:
    """The settings that the model can be converted with, and why it cannot with the others."""
    rows: list[_Row] = []
    refused: list[dict[str, Any]] = []
    error: LayoutError | None = None
    steps = Steps()
    for layout in grid.layouts or (registry.AUTO,):
        for bits in grid.bits or methods.WIDTHS:
            for rank in grid.ranks or DEFAULT_RANKS:
                options = Options(bits=bits, rank=rank, layout=layout)
                try:
                    plan = make_plan(source, options.resolve())
                except LayoutError as found:
                    error = error or found
                    refused.append(
                        {"bits": bits, "layout": layout, "reason": _first(found.message)}
                    )
                    break
                memory = training_memory(plan, training, steps)
                rows.append(_Row(bits, rank, layout, plan, memory))
    if not rows:
        raise error or UsageError("no setting is left to look at")
    return rows, refused


def _first(message: str) -> str:
    """Of a list of matrices that a layout cannot hold, the first."""
    first, *others = message.split("; ")
    return first + (f" (and {len(others)} more)" if others else "")


def _command(request: Request, row: _Row) -> str:
    words = ["loftq", "convert", request.model, "--bits", str(row.bits), "--rank", str(row.rank)]
    if row.layout != registry.AUTO:
        words += ["--layout", row.layout]
    if request.revision is not None:
        words += ["--revision", request.revision]
    for given, option in ((request.offline, "--offline"), (request.allow_pickle, "--allow-pickle")):
        words += [option] if given else []
    return shlex.join(words)
