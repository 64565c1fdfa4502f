"""Where a twin's arguments lead: paths, and conversions that may be on the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli.machine.paths import expanded

if TYPE_CHECKING:
    from loftq_cli.checkpoint.locate import Place

AnyPath = str | os.PathLike[str]


def paths(given: AnyPath | Sequence[AnyPath]) -> list[Path]:
    several = [given] if isinstance(given, (str, os.PathLike)) else given
    return [expanded(path) for path in several]


def located(directory: AnyPath, revision: str | None, offline: bool, *, everything: bool) -> Place:
    """Where the conversion ``directory``, a path or a hub id, lies."""
    from loftq_cli.checkpoint.locate import locate_output
    from loftq_cli.machine.observer import Logged

    return locate_output(
        directory, revision=revision, offline=offline, everything=everything, listener=Logged()
    )
