"""Errors as processes that work together tell each other of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loftq_cli import errors
from loftq_cli.errors import EnvironmentFailure, LoftqError


def told(error: LoftqError | None) -> dict[str, Any]:
    """``error`` as a message to other processes; nothing for none."""
    if error is None:
        return {}
    return {"kind": type(error).__name__, "message": error.message, "hint": error.hint}


def read(rank: int, message: Mapping[str, Any]) -> LoftqError:
    """The error that another process has :func:`told` of; of a machine, it says of whose."""
    kind = getattr(errors, message["kind"], EnvironmentFailure)
    text = message["message"]
    if issubclass(kind, EnvironmentFailure):
        text = f"rank {rank}: {text}"
    error: LoftqError = kind(text, hint=message["hint"])
    return error


INTERRUPTED = EnvironmentFailure("it was interrupted", hint="run the same command again")
