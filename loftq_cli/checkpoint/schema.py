"""Checks a manifest against loftq_cli/manifest.schema.json, without a dependency for it.

Only the keywords that this schema uses are understood; another one is an error of ours, so that
none is ever skipped in silence. Stricter than JSON Schema in two points: an integer is not written
with a decimal point, and numbers are finite.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any

from loftq_cli.checkpoint.header import shown

_ANNOTATIONS = frozenset(("$schema", "$defs", "title", "description"))
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
    "boolean": (bool,),
}


_REGISTERED: dict[str, set[str]] = {"layout": set(), "method": set()}


def allow(field: str, name: str) -> None:
    """Let manifests have ``name``, which is registered from outside, as "layout" or "method"."""
    _REGISTERED[field].add(name)


def disallow(field: str, name: str) -> None:
    """Undo :func:`allow`."""
    _REGISTERED[field].discard(name)


@cache
def manifest_schema() -> dict[str, Any]:
    """The schema that comes with the package."""
    text = resources.files("loftq_cli").joinpath("manifest.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def faults(value: Any, schema: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """What is wrong with ``value``, one line each, with the path of the place."""
    for keyword, argument in schema.items():
        if keyword == "$ref":
            definition = manifest_schema()["$defs"][argument.removeprefix("#/$defs/")]
            yield from faults(value, definition, path)
        elif keyword not in _ANNOTATIONS:
            yield from _CHECKS[keyword](value, argument, schema, path)


def _type(value: Any, names: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    allowed = [names] if isinstance(names, str) else names
    kinds = {kind for name in allowed for kind in _TYPES[name]}
    if type(value) not in kinds or (type(value) is float and not math.isfinite(value)):
        yield f"{path}: {shown(value)} is not {' or '.join(allowed)}"


def _choice(value: Any, choices: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    registered = _REGISTERED.get(path.rpartition(".")[2], set())
    if isinstance(value, str) and value in registered:
        return
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        yield f"{path}: {shown(value)} is not one of {', '.join(map(str, choices))}"


def _const(value: Any, only: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    return _choice(value, [only], schema, path)


def _minimum(value: Any, least: float, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    if _is_number(value) and value < least:
        yield f"{path}: {value} is below {least}"


def _maximum(value: Any, most: float, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    if _is_number(value) and value > most:
        yield f"{path}: {shown(value)} is above {most}"


def _above(value: Any, bound: float, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    if _is_number(value) and value <= bound:
        yield f"{path}: {value} is not above {bound}"


def _pattern(value: Any, pattern: str, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    if isinstance(value, str) and not re.search(pattern.replace("$", r"\Z"), value):
        yield f"{path}: {shown(value)} does not match {pattern}"


def _fewest(value: Any, count: int, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    if isinstance(value, list) and len(value) < count:
        yield f"{path}: fewer than {count} entries"


def _most(value: Any, count: int, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    if isinstance(value, list) and len(value) > count:
        yield f"{path}: more than {count} entries"


def _items(value: Any, each: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    for number, item in enumerate(value if isinstance(value, list) else ()):
        yield from faults(item, each, f"{path}[{number}]")


def _required(value: Any, names: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    for name in names if isinstance(value, dict) else ():
        if name not in value:
            yield f"{_join(path, name)}: missing"


def _properties(value: Any, known: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    for name, item in value.items() if isinstance(value, dict) else ():
        if name in known:
            yield from faults(item, known[name], _join(path, name))


def _additional(value: Any, allowed: bool, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    for name in value if isinstance(value, dict) and not allowed else ():
        if name not in schema["properties"]:
            yield f"{_join(path, shown(name))}: not a field that this version knows"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


_CHECKS: dict[str, Callable[[Any, Any, Mapping[str, Any], str], Iterator[str]]] = {
    "type": _type,
    "enum": _choice,
    "const": _const,
    "minimum": _minimum,
    "exclusiveMinimum": _above,
    "maximum": _maximum,
    "pattern": _pattern,
    "minItems": _fewest,
    "maxItems": _most,
    "items": _items,
    "required": _required,
    "properties": _properties,
    "additionalProperties": _additional,
}
