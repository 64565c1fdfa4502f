"""How often accidents are repeated: a little in ``make test``, much in ``make stress``."""

from __future__ import annotations

import os
import sys

STRESS = os.environ.get("LOFTQ_STRESS") == "1"


def times(count: int, stressed: int | None = None) -> int:
    """``count``, or in ``make stress`` ``stressed``, by default ten times as many."""
    return (stressed or 10 * count) if STRESS else count


def tell(figures: str) -> None:
    """Say what a test came to; `make stress` shows it."""
    sys.stdout.write(f"\n    {figures}\n")
