"""Accidents that happen to a process in the middle of a method. Nothing heavy is imported here: it
would be in every such process."""

from __future__ import annotations

import functools
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loftq_cli.errors import NonFiniteActivationError
from loftq_cli.machine import group
from loftq_cli.numerics.moments import Moments
from loftq_cli.refinement import settings


def at_call(
    owner: type, name: str, call: int, number: signal.Signals = signal.SIGKILL
) -> Callable[[], None]:
    """A fault: the process gets a signal at the given call of a method, counted from 1."""
    return functools.partial(_watch, owner, name, call, number)


def _watch(owner: type, name: str, call: int, number: signal.Signals) -> None:
    calls, method = itertools.count(1), getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return method(*arguments, **options)

    setattr(owner, name, wrapped)


def impatient() -> None:
    """Who gives no sign of life for two seconds is taken for dead."""
    group.PATIENCE = 2.0


def hurried(directory: Path) -> None:
    """No accident: the process is in ``directory``, and trains a model end to end in two steps
    unless it is told in how many."""
    os.chdir(directory)
    settings.STEPS = 2


def overflow() -> None:
    """A fault: all inputs that are measured are NaN."""

    def add(*arguments: Any) -> None:
        raise NonFiniteActivationError("the inputs hold NaN or Inf")

    Moments.add = add  # type: ignore[method-assign, assignment]
