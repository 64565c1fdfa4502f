"""What ``loftq evaluate --save`` found, in a file beside the manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.output import Output, open_output
from loftq_cli.checkpoint.small_file import read_json
from loftq_cli.errors import CorruptFileError, InputError, UsageError
from loftq_cli.machine.durable import pretty_json, write_file
from loftq_cli.reporting.rows import FIGURES

FILE = "loftq_evaluations.json"
_KEY = ("texts", "source", "adapter", "samples", "length", "seed")
_NUMBERS = (*FIGURES, "samples", "length", "seed", "tokens")


def refuse_to_save(directory: Path, *, on_hub: bool) -> None:
    """Raise UsageError if evaluations cannot be kept there, what :func:`open_output` raises if it
    is no conversion, and CorruptFileError if what is there cannot be kept."""
    if on_hub:
        raise UsageError("--save is for a directory", hint="--json prints what was found")
    saved(open_output(directory))


def save(directory: Path, found: Mapping[str, Any]) -> None:
    """Keep what was ``found`` of the conversion in ``directory``, in the place of an evaluation of
    the same on the same text. Raises as :func:`refuse_to_save`, InputError for figures that are not
    finite, and EnvironmentFailure."""
    output = open_output(directory)
    entry = {**found, "fingerprint": output.fingerprint}
    if not _is_sound(entry):
        raise InputError(
            f"{directory}: what was found is not finite, and is not kept",
            hint="evaluate without --save to see it: the model, or its source, is damaged",
        )
    others = [each for each in saved(output) if key(each) != key(entry)]
    content = {"format_version": 1, "evaluations": [*others, entry]}
    write_file(directory / FILE, pretty_json(content))


def saved(output: Output) -> list[dict[str, Any]]:
    """The evaluations of ``output`` that were kept, the oldest first; those of what was in its
    place before are left out. Raises CorruptFileError if the file is damaged."""
    path = output.directory / FILE
    if not path.exists():
        return []
    content = read_json(path).content
    entries = content.get("evaluations")
    if content.get("format_version") != 1 or not isinstance(entries, list):
        raise _damaged(path)
    for entry in entries:
        if not isinstance(entry, dict) or not _is_sound(entry):
            raise _damaged(path)
    return [entry for entry in entries if entry["fingerprint"] == output.fingerprint]


def of_start(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that are of the conversion itself, not of an adapter that was trained."""
    return [entry for entry in entries if entry["adapter"] is None]


def key(entry: Mapping[str, Any]) -> tuple[object, ...]:
    """What two evaluations have in common that can be compared."""
    return tuple(str(entry[name]) for name in _KEY)


def _is_sound(entry: Mapping[str, Any]) -> bool:
    texts = entry.get("texts")
    return (
        {*_KEY, *_NUMBERS, "fingerprint"} <= entry.keys()
        and isinstance(texts, list)
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(entry[name], str | None) for name in ("source", "adapter"))
        and all(_is_figure(entry[name]) for name in _NUMBERS)
    )


def _is_figure(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def _damaged(path: Path) -> CorruptFileError:
    return CorruptFileError(
        f"{path}: not what `loftq evaluate --save` writes", hint="delete it, and evaluate again"
    )
