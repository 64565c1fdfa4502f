"""``--target-size`` and ``--fit``: what may be taken on disk, or to train, as ``--target-bpw``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from loftq_cli.checkpoint.writer import place
from loftq_cli.errors import UnsupportedInputError, UsageError
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.training_memory import Steps, Training, training_memory
from loftq_cli.settings.sizes import binary, decimal, size_of

OF_FIT = {"length": "--fit-length", "batch": "--fit-batch"}
_STEPS = 1_000_000  # of bits per weight
_UNSETTLED = 8.0  # bits per weight, until the headers tell


@dataclass(frozen=True)
class Budget:
    """``size``: bytes of the tensor files; ``memory``: bytes to fine-tune with, as ``training``
    says. One of the two. ``said``: as it was asked for."""

    said: str
    size: int | None = None
    memory: int | None = None
    training: Training = Training()  # noqa: RUF009  (frozen)

    def target(self, plan: Plan) -> float:
        """The ``target_bpw`` that keeps ``plan``, in which every width is open, within this.

        Raises UsageError if even the narrowest codes do not, UnsupportedInputError if nobody
        knows what a training step takes.
        """
        stored = sum(spec.nbytes for item in plan.matrices.values() for spec in item.specs)
        least = file_bytes(plan) if self.memory is None else self._to_train(plan)
        most = self.size if self.memory is None else self.memory
        assert most is not None
        if least > most:
            self._refuse(plan, least, stored)
        elements = sum(item.matrix.elements for item in plan.matrices.values())
        bits = Fraction((most - least + stored) * 8, elements)
        return math.floor(bits * _STEPS) / _STEPS

    def _to_train(self, plan: Plan) -> int:
        training = self.training.settled(plan.source, OF_FIT)
        found = training_memory(plan, training, Steps())
        if found.least is None:
            raise UnsupportedInputError(
                f"{self.said}: what a training step takes cannot be counted: {found.unknown}",
                hint="use --target-size, or --target-bpw",
            )
        return found.least

    def _refuse(self, plan: Plan, least: int, stored: int) -> None:
        adapter = plan.adapter_bytes
        if self.memory is None:
            rest = f"{decimal(stored)} of codes and scales, {decimal(adapter)} of adapter"
            raise UsageError(
                f"{self.said}: the files take at least {decimal(least)} in layout "
                f"{plan.layout.name}: {rest}, {decimal(least - stored - adapter)} of tensors that "
                "stay as they are",
                hint="ask for that or more, or for a smaller --rank or larger blocks",
            )
        training = self.training.settled(plan.source, OF_FIT)
        raise UsageError(
            f"{self.said}: fine-tuning takes at least {binary(least)} at the narrowest codes, with "
            f"{training.batch} x {training.length} tokens and gradient checkpointing",
            hint="ask for a smaller --fit-length, --fit-batch or --rank",
        )


def asked(
    settings: dict[str, Any],
    size: str | None,
    memory: str | None,
    length: int | None,
    batch: int | None,
) -> Budget | None:
    """What the options ask for, None if it is nothing. ``settings``, as they were given, then have
    a target that is yet to be settled. Raises UsageError."""
    if memory is None:
        for value, name in ((length, "--fit-length"), (batch, "--fit-batch")):
            if value is not None:
                raise UsageError(f"{name} {value} is for --fit", hint="say the memory with --fit")
    if size is None and memory is None:
        return None
    given: Mapping[str, Any] = {"--target-size": size, "--fit": memory}
    given = {**given, "--bits": settings.get("bits"), "--target-bpw": settings.get("target_bpw")}
    named = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in given.items()
        if value is not None
    ]
    if len(named) > 1:
        raise UsageError(
            f"{named[0]} and {named[1]}: only one can decide the widths",
            hint="--bits-map fixes the width of some matrices under either",
        )
    settings["target_bpw"] = _UNSETTLED
    if size is not None:
        return Budget(named[0], size=size_of("--target-size", size))
    assert memory is not None
    training = Training(length, 1 if batch is None else batch)
    return Budget(named[0], memory=size_of("--fit", memory), training=training)


def file_bytes(plan: Plan) -> int:
    """Bytes of the tensor files of a finished conversion, headers included."""
    files = [list(shard.specs) for shard in plan.shards] + [plan.adapter_specs]
    return sum(len(place(specs)[0]) + sum(spec.nbytes for spec in specs) for specs in files)
