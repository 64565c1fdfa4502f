"""Recipes as files: settings in TOML or JSON, or the manifest of an earlier conversion.

The keys are the names of settings, that is of the long options with underscores. What a file says
is overruled by the command line and overrules a preset's defaults.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.header import strict_json
from loftq_cli.checkpoint.lfs import refuse_pointer
from loftq_cli.checkpoint.output import MANIFEST, MAX_MANIFEST_BYTES, read_manifest
from loftq_cli.errors import EnvironmentFailure, InputError, SourceNotFoundError, UsageError
from loftq_cli.machine.durable import readable, write_file
from loftq_cli.machine.resources import check_permissions
from loftq_cli.settings.options import Options
from loftq_cli.settings.recipe import settings_of

_MAX_BYTES = 16 << 20

_KEYS = "keys are the long options of `loftq convert`, with underscores"

_SHA256 = re.compile("[0-9a-f]{64}")

_ALTERNATIVES = ("bits", "target_bpw")
"""Settings of which the last given decides, wherever it was given."""


def options(
    settings: Mapping[str, Any], path: Path | None = None, *, measuring: bool = False
) -> Options:
    """Options from keyword arguments on top of those in the recipe at ``path``. ``measuring``: the
    statistics are measured anew, whichever the recipe was made with.

    Raises UsageError for unknown settings and bad values, SourceNotFoundError and InputError for
    a file that is not there or is no recipe.
    """
    if path is None:
        return Options(**settings)
    held = read(path)
    given = {name: value for name, value in settings.items() if value not in (None, (), [])}
    if measuring and _SHA256.fullmatch(str(held.get("stats"))):
        del held["stats"]
    if "stats" not in given and _SHA256.fullmatch(str(held.get("stats"))):
        raise UsageError(
            f"{path}: the conversion used the activation statistics of sha256 {held['stats']}",
            hint="name the file with --stats",
        )
    if given:
        held.pop("widths", None)  # they may not be what the settings now lead to
    if given.keys() & set(_ALTERNATIVES):
        held = {name: value for name, value in held.items() if name not in _ALTERNATIVES}
    return Options(**{**held, **given})


def read(path: Path) -> dict[str, Any]:
    """The settings in the file at ``path``, checked as if they were all there is."""
    if not path.is_file():
        raise SourceNotFoundError(
            f"{path}: no such file", hint=f"give a TOML or JSON file, or a {MANIFEST}"
        )
    refuse_pointer(path)
    held = _json(path) if path.suffix.lower() == ".json" else _toml(path)
    try:
        Options(**held).resolve()
    except UsageError as error:
        hint = error.hint if error.hint != UsageError.default_hint else _KEYS
        raise type(error)(f"{path}: {error.message}", hint=hint or _KEYS) from error
    return held


def save(path: Path, recipe: Mapping[str, Any]) -> None:
    """Write the settings that lead to ``recipe`` to the TOML file at ``path``."""
    lines = [f"{name} = {_value(value)}\n" for name, value in sorted(settings_of(recipe).items())]
    write_file(path, "".join(lines).encode())


def check_writable(path: Path, *, dry_run: bool) -> None:
    """Raise UsageError or EnvironmentFailure if no recipe can be saved at ``path``."""
    if dry_run:
        raise UsageError(f"--save-recipe {path}: --dry-run writes nothing")
    if path.is_dir() or not path.parent.is_dir():
        what = "is a directory" if path.is_dir() else f"there is no directory {path.parent}"
        raise UsageError(f"--save-recipe {path}: {what}", hint="name a file to write")
    check_permissions(path.parent)


def _json(path: Path) -> dict[str, Any]:
    """The settings in a JSON object, or those that a manifest holds."""
    try:
        content = strict_json(_raw(path, MAX_MANIFEST_BYTES))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}", hint=_KEYS) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object", hint=f"{_KEYS}; or give a {MANIFEST}")
    if path.name == MANIFEST or "format_version" in content:
        return settings_of(read_manifest(path)["recipe"])
    return content


def _raw(path: Path, most: int) -> bytes:
    try:
        with readable(path):
            if path.stat().st_size > most:
                raise InputError(f"{path}: larger than {most >> 20} MiB, this is no recipe")
            return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError as error:
        raise EnvironmentFailure(
            f"{path}: reading TOML needs Python 3.11",
            hint=f"give JSON, a {MANIFEST}, or the options themselves",
        ) from error
    try:
        return tomllib.loads(_raw(path, _MAX_BYTES).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # of TOML and of UTF-8
        raise InputError(
            f"{path}: not valid TOML: {error}", hint=f"{_KEYS}; a JSON file is named .json"
        ) from error


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + "".join(f"\n    {_value(item)}," for item in value) + "\n]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but that TOML wants one for DEL too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
