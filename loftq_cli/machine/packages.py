"""Packages that only an extra of ours installs."""

from __future__ import annotations

import importlib
from typing import Any

from loftq_cli.errors import EnvironmentFailure


def required(package: str, extra: str, doing: str) -> Any:
    """The module ``package``, which ``doing`` needs and the extra ``extra`` installs. Raises
    EnvironmentFailure if it cannot be imported."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise missing_extra(error, extra, doing) from error


def missing_extra(error: ImportError, extra: str, doing: str) -> EnvironmentFailure:
    """What to raise for an ``error`` from a package of ``extra``."""
    return EnvironmentFailure(
        f"{doing} needs a package that is not installed: {error}",
        hint=f'pip install "loftq-cli[{extra}]"',
    )
