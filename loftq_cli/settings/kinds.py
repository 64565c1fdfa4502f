"""Kinds of settings: what a value may be, and what a manifest's schema says of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loftq_cli.errors import UsageError
from loftq_cli.machine.paths import expanded
from loftq_cli.settings import maps

LARGEST = 1e30
"""Of a positive number: an adapter that is divided by it still fits float32."""


class Kind:
    """What the values of a setting are. ``repeats``: the option may be given several times."""

    type: type = str
    repeats = False

    def canonical(self, name: str, value: Any) -> Any:
        """``value`` in the form that a recipe holds, as far as its form tells. Raises
        UsageError."""
        return value

    def checked(self, name: str, value: Any) -> Any:
        """The canonical ``value``, in range. Raises UsageError."""
        return value

    def schema(self) -> dict[str, Any]:
        """JSON Schema of a value in a manifest."""
        raise NotImplementedError


@dataclass(frozen=True)
class Choice(Kind):
    """One of a few; ``of`` may be a function, asked when it is needed."""

    of: tuple[Any, ...] | Callable[[], tuple[Any, ...]]

    @property
    def choices(self) -> tuple[Any, ...]:
        return self.of() if callable(self.of) else self.of

    @property
    def type(self) -> type:  # type: ignore[override]
        return type(self.choices[0])

    def checked(self, name: str, value: Any) -> Any:
        check_choice(name, value, self.choices)
        return value

    def schema(self) -> dict[str, Any]:
        return {"enum": list(self.choices)}


class Truth(Kind):
    """True or false."""

    type = bool

    def checked(self, name: str, value: Any) -> Any:
        if type(value) is not bool:
            raise UsageError(
                f"{flag(name)} {value!r}: must be true or false, not {described(value)}"
            )
        return value

    def schema(self) -> dict[str, Any]:
        return {"enum": [False, True]}


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number in a range."""

    low: int
    high: int
    type = int

    def checked(self, name: str, value: Any) -> Any:
        if type(value) is not int or not self.low <= value <= self.high:
            raise UsageError(
                f"{flag(name)} {shown(value)}: must be a whole number from {self.low} to "
                f"{self.high}"
            )
        return value

    def schema(self) -> dict[str, Any]:
        return {"$ref": "#/$defs/positive" if self.low else "#/$defs/count"}


class Positive(Kind):
    """A positive number."""

    type = float

    def checked(self, name: str, value: Any) -> Any:
        if not (is_number(value) and 0 < value <= LARGEST):
            raise UsageError(
                f"{flag(name)} {shown(value)}: must be a positive number up to {LARGEST:g}"
            )
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": LARGEST}


@dataclass(frozen=True)
class Bits(Kind):
    """One of the ``widths``, or a fraction that ``mixes`` two of them."""

    widths: tuple[int, ...]
    mixed: tuple[int, int]
    type = float

    def checked(self, name: str, value: Any) -> Any:
        if not is_number(value):
            raise UsageError(
                f"{flag(name)} {shown(value)}: must be a number, not {described(value)}"
            )
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        fraction = isinstance(value, float) and self.mixed[0] < value < self.mixed[1]
        if not fraction and (type(value) is not int or value not in self.widths):
            listed = ", ".join(str(width) for width in self.widths)
            narrow, wide = self.mixed
            raise UsageError(
                f"{flag(name)} {value}: not one of {listed}, nor a fraction between {narrow} and "
                f"{wide}"
            )
        return value

    def schema(self) -> dict[str, Any]:
        low, high = self.widths[0], self.widths[-1]
        return {"type": ["number", "null"], "minimum": low, "maximum": high}


class Patterns(Kind):
    """Globs over names of tensors: one, several, or none."""

    repeats = True

    def canonical(self, name: str, value: Any) -> tuple[str, ...]:
        patterns = (value,) if isinstance(value, str) else value
        if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
            raise UsageError(f"{flag(name)} {value!r}: must be a pattern or a list of patterns")
        return tuple(patterns)

    def schema(self) -> dict[str, Any]:
        return {"$ref": "#/$defs/patterns"}


@dataclass(frozen=True)
class Map(Kind):
    """``PATTERN=VALUE`` entries, with values ``of`` a kind (see maps)."""

    of: Kind

    def canonical(self, name: str, value: Any) -> tuple[str, ...]:
        return maps.canonical(flag(name), value)

    def checked(self, name: str, value: Any) -> Any:
        for number in maps.parse(flag(name), value).values():
            self.of.checked(name, number)
        return value

    def schema(self) -> dict[str, Any]:
        return {"$ref": "#/$defs/map"}


class File(Kind):
    """The path of a file."""

    def checked(self, name: str, value: Any) -> Any:
        if not isinstance(value, (str, os.PathLike)):
            raise UsageError(
                f"{flag(name)} {value!r}: must be the path of a file, not {described(value)}"
            )
        return str(expanded(value))


@dataclass(frozen=True)
class Text(Kind):
    """Text that says which of ``examples`` is meant."""

    examples: str

    def checked(self, name: str, value: Any) -> Any:
        if not isinstance(value, str):
            raise UsageError(f"{flag(name)} {value!r}: use {self.examples}")
        return value


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise UsageError if ``value`` is not one of ``choices``, of the same type."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        said = value if isinstance(choices[0], str) else shown(value)
        listed = ", ".join(str(choice) for choice in choices)
        raise UsageError(f"{flag(name)} {said}: not one of {listed}")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value where a number belongs: ``"2"`` is none."""
    return repr(value) if isinstance(value, str) else str(value)


def described(value: Any) -> str:
    """What a value is, as who writes a recipe would call it."""
    kinds = {str: "text", bool: "true or false", list: "a list", dict: "a table"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


def flag(name: str) -> str:
    """The option of a setting."""
    return "--" + name.replace("_", "-")
