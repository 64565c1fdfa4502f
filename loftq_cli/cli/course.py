"""How far some work has come, and how long what is left of it will take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

_HURRY = 90  # of a unit: below that it is told in the smaller one


@dataclass
class Course:
    """``total`` of ``unit`` to be worked through from when this was made on. ``items``, of which
    ``finished`` are, are what it consists of, and ``told`` is how it stands."""

    doing: str
    total: float
    unit: str
    clock: Callable[[], float]
    items: int = 0
    noun: str = ""
    finished: int = 0
    told: str = ""
    amount: float = 0.0
    skipped: float = 0.0
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.clock()

    @property
    def seconds_left(self) -> float | None:
        """By what was done anew so far; None before anything was, and after everything."""
        anew, left = self.amount - self.skipped, self.total - self.amount
        if anew <= 0 or left <= 0:
            return None
        return (self.clock() - self.began) / anew * left

    def status(self) -> str:
        """``95 of 210 matrices, residual 0.0713, 12 min left``."""
        share = min(1.0, self.amount / self.total) if self.total else 1.0
        if self.items:
            parts = [f"{self.finished} of {self.items} {self.noun}"]
        elif self.unit.strip() and self.unit != "B":
            parts = [f"{self.amount:.0f} of {self.total:.0f}{self.unit}"]
        else:
            parts = [f"{share:.0%}"]
        left = self.seconds_left
        parts += [self.told] if self.told else []
        parts += [] if left is None else [f"{duration(left)} left"]
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """A time in one unit or two: ``40 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < _HURRY:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < _HURRY else f"{minutes // 60} h {minutes % 60} min"
