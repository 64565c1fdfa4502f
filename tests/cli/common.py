"""What the tests of the commands share."""

from __future__ import annotations

from collections.abc import Callable

from click.testing import Result

QUICK = ("--rank", "4", "--iters", "2", "-t", "1")

Command = Callable[..., Result]
"""Runs ``loftq`` with these words."""
