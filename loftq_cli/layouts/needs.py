"""What has to be installed if an output is loaded and trained."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from loftq_cli.layouts.registry import layout_class


def needs(layout: str) -> dict[str, Any]:
    """The ``imports`` that an output of ``layout`` needs, which of them are ``missing`` here, and
    the command to ``install`` them with."""
    made = layout_class(layout)
    return {
        "imports": list(made.imports),
        "missing": [name for name in made.imports if find_spec(name) is None],
        "install": f'pip install "loftq-cli[{made.extra}]"',
    }
