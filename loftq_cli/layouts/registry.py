"""The layouts, by name.

A layout of ours is a module here that bears its name and holds its class as ``LAYOUT``; one from
outside is registered with :func:`register`. torch is not imported before a layout is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint import schema
from loftq_cli.errors import UnsupportedInputError

if TYPE_CHECKING:
    from loftq_cli.layouts.base import Layout

AUTO = "auto"
"""The setting that leaves the choice to planning.choices."""

_OURS = ("bnb", "gptq", "awq", "compressed", "loftq", "dense")
GIVEN = "given"
"""A backbone that is not ours, which no conversion is asked to write."""

_OTHERS: dict[str, type[Layout]] = {}


def register(layout: type[Layout]) -> type[Layout]:
    """Make ``layout`` known under its name; usable as a decorator."""
    _OTHERS[layout.name] = layout
    schema.allow("layout", layout.name)
    return layout


def unregister(name: str) -> None:
    """Forget the registered layout ``name``."""
    del _OTHERS[name]
    schema.disallow("layout", name)


def names() -> tuple[str, ...]:
    """All layouts, in the order in which they are listed."""
    return (*_OURS, *_OTHERS)


def layout_class(name: str) -> type[Layout]:
    """The layout ``name``. Raises UnsupportedInputError if there is none: a file names it."""
    if name in _OTHERS:
        return _OTHERS[name]
    if name not in (*_OURS, GIVEN):
        raise UnsupportedInputError(
            f"layout {name!r} is not one of {', '.join(names())}",
            hint="pip install --upgrade loftq-cli, or import what it comes from",
        )
    found: type[Layout] = importlib.import_module(f"loftq_cli.layouts.{name}").LAYOUT
    return found


def every() -> list[type[Layout]]:
    """All layouts."""
    return [layout_class(name) for name in names()]


def holding_everything() -> type[Layout]:
    """The layout that holds whatever there is."""
    return next(layout for layout in every() if layout.holds_everything)


def make_layout(name: str, recipe: Mapping[str, Any]) -> Layout:
    """The layout ``name`` as the settings of ``recipe`` want it. Raises as
    :func:`layout_class`."""
    return layout_class(name).of(recipe)


def layout_of(record: Mapping[str, Any], recipe: Mapping[str, Any]) -> Layout:
    """The layout of an entry of the manifest's ``matrices``, given the manifest's ``recipe``.
    Raises as :func:`layout_class`."""
    return make_layout(record["layout"], recipe)
