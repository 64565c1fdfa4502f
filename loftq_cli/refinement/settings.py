"""What is asked of a refinement, and what its defaults are."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loftq_cli.errors import UsageError
from loftq_cli.refinement.training import Rates

SAMPLES = 288
"""Windows of text, if there are as many."""
HELD = 10
"""One window of so many is held out."""
EPOCHS = 1
STEPS = 48
"""End to end."""
BATCH = 4
BLOCK_RATES = Rates(pair=0.015, scales=1e-3, codes=1e-2)
WHOLE_RATES = Rates(pair=4e-3, scales=1e-3, codes=0.0)
PACE = 16
"""Steps end to end between two looks at the held windows."""
REVISION = 7
"""Raised when the same settings would give other bytes."""


@dataclass(frozen=True)
class Refining:
    """What to do. ``samples`` windows of ``length`` tokens, None: up to 288 of 512, or as many as
    the model takes; ``epochs`` over them block by block, then ``end_to_end`` steps of the whole
    model, None: what pays most and there is memory for. ``adapter``: a trained one, to go on from.
    Raises UsageError for a value out of range."""

    samples: int | None = None
    length: int | None = None
    epochs: int | None = None
    end_to_end: int | None = None
    device: str = "auto"
    seed: int = 0
    adapter: Path | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        for name, value, low in (
            ("samples", self.samples, 2),
            ("length", self.length, 2),
            ("epochs", self.epochs, 0),
            ("end-to-end", self.end_to_end, 0),
            ("seed", self.seed, 0),
        ):
            if value is not None and not low <= value < 1 << 31:
                raise UsageError(f"--{name} {value}: must be a whole number from {low}")
        if self.epochs == self.end_to_end == 0:
            raise UsageError("--epochs 0 --end-to-end 0 leave nothing to do", hint="give one")

    def settled(self, *, whole: bool) -> Refining:
        """With what is left open: the blocks, and then the ``whole`` model if it can be. Who asks
        for one of the two gets that one."""
        steps, epochs = self.end_to_end, self.epochs
        if steps is None:
            steps = STEPS if whole and not epochs else 0
        if epochs is None:
            epochs = 0 if self.end_to_end else EPOCHS
        return replace(self, end_to_end=steps, epochs=epochs)

    def going_on(self, adapter: Path) -> Refining:
        """The same, from a trained adapter on."""
        return replace(self, adapter=adapter)

    def described(self) -> dict[str, Any]:
        """What the manifest says was asked for."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in ("device", "adapter", "offline")
        } | {
            "batch": BATCH,
            "block_rates": asdict(BLOCK_RATES),
            "whole_rates": asdict(WHOLE_RATES),
            "revision": REVISION,
        }
