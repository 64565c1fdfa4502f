"""What is asked of a refinement, and what its defaults are."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loftq_cli.errors import UsageError
from loftq_cli.refinement.training import Rates

SAMPLES = 256
"""Windows of text, if there are as many."""
HELD = 10
"""One window of so many is held out."""
EPOCHS = 1
BATCH = 4
BLOCK_RATES = Rates(pair=4e-3, scales=2e-3, codes=1e-2)
WHOLE_RATES = Rates(pair=4e-4, scales=1e-3, codes=0.0)
PACE = 16
"""Steps end to end between two looks at the held windows."""
REVISION = 1
"""Raised when the same settings would give other bytes."""


@dataclass(frozen=True)
class Refining:
    """What to do. ``samples`` windows of ``length`` tokens, None: up to 256 of 512, or as many as
    the model takes; ``epochs`` over them block by block, then ``end_to_end`` steps of the whole
    model. ``adapter``: a trained one, to go on from. Raises UsageError for a value out of
    range."""

    samples: int | None = None
    length: int | None = None
    epochs: int = EPOCHS
    end_to_end: int = 0
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
        if not self.epochs and not self.end_to_end:
            raise UsageError("--epochs 0 leaves nothing to do", hint="give --end-to-end STEPS")

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
