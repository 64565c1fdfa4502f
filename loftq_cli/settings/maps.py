"""Settings that differ from matrix to matrix: ``PATTERN=VALUE`` entries, globs over tensor names.

Later entries win, so that a map reads from the rule to its exceptions: ``*=2,*.down_proj.*=4``.
A recipe holds a map as the entries that were given, in their order.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

from loftq_cli.errors import PatternError, UsageError, printable

_ENTRY = re.compile(r"(?P<pattern>.+)=(?P<value>\d{1,9})", re.DOTALL)


def canonical(option: str, value: Any) -> tuple[str, ...]:
    """The entries of a map as it was given: ``"PATTERN=VALUE,…"``, a list of entries, or a
    mapping. Commas separate entries in the first form only. Raises UsageError."""
    if value is None:
        return ()
    if isinstance(value, str):
        entries: Sequence[Any] = value.split(",")
    elif isinstance(value, Mapping):
        entries = [f"{pattern}={number}" for pattern, number in value.items()]
    else:
        entries = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(entry, str) for entry in entries):
        raise UsageError(f"{option} {value!r}: must be PATTERN=NUMBER entries")
    return tuple(entry.strip() for entry in entries)


def parse(option: str, entries: Sequence[str]) -> dict[str, int]:
    """Pattern to number, in the order given. Raises UsageError for an entry that is none, or for
    a pattern that is there twice."""
    parsed: dict[str, int] = {}
    for entry in entries:
        found = _ENTRY.fullmatch(entry)
        if found is None:
            raise UsageError(f"{option} {entry!r}: must be PATTERN=NUMBER")
        pattern = found["pattern"].strip()
        if pattern in parsed:
            raise UsageError(f"{option}: the pattern {pattern!r} is there twice")
        parsed[pattern] = int(found["value"])
    return parsed


def apply(option: str, entries: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Name to number, for those of ``names`` that a pattern matches; the last match wins.

    Raises PatternError if a pattern matches none of them, and UsageError if later entries
    overrule one everywhere, which only a mistake explains.
    """
    values: dict[str, int] = {}
    decided: dict[str, str] = {}
    parsed = parse(option, entries)
    for pattern, value in parsed.items():
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern.strip("*"), names, n=3, cutoff=0.3)
            shown = f"; near names: {', '.join(printable(name) for name in near)}" if near else ""
            raise PatternError(f"{option} {pattern!r} matches no matrix to quantize{shown}")
        values.update(dict.fromkeys(matched, value))
        decided.update(dict.fromkeys(matched, pattern))
    idle = [pattern for pattern in parsed if pattern not in decided.values()]
    if idle:
        raise UsageError(
            f"{option}: {idle[0]!r} decides nothing, later entries match all that it matches",
            hint="later entries win: put the general ones first",
        )
    return values
