"""In what two conversions differ, for messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loftq_cli.checkpoint.journal import Subject

_LONGEST = 200  # characters of a setting's value in a message


def differences(found: Subject, wanted: Subject) -> str:
    """The settings and source files in which two conversions differ, both values shown."""
    parts = different_settings(found.recipe, wanted.recipe)
    there = {name: _file(*rest) for name, *rest in found.sources}
    now = {name: _file(*rest) for name, *rest in wanted.sources}
    parts += [
        f"source file {name} {there.get(name, 'absent')} there, {now.get(name, 'absent')} now"
        for name in sorted({*there, *now})
        if there.get(name) != now.get(name)
    ]
    return "; ".join(parts) or "the fingerprints differ"


def _file(size: int, sha256: str) -> str:
    return f"{size} bytes, sha256 {sha256[:16]}…"


def differing_settings(there: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """The names of the settings in which two recipes differ."""
    return {name for name in {*there, *now} if there.get(name) != now.get(name)}


def different_settings(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings in which two recipes differ, both values shown."""
    names = sorted(differing_settings(there, now))
    if len(names) > 1:  # what was settled follows from the others
        names = [name for name in names if name != "widths"]
    return [
        f"{name} {_short(there.get(name))} there, {_short(now.get(name))} now" for name in names
    ]


def _short(value: Any) -> str:
    """What a message can hold of a setting: there may be an entry for every matrix."""
    text = repr(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
