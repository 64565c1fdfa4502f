"""The resolved recipe: every setting that can change a byte of the output, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from loftq_cli.layouts import registry
from loftq_cli.settings.table import Settings, entries


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """The settings of a conversion.

    ``method`` (but for "auto" if widths that differ have methods that differ), ``layout`` and
    ``threads`` are settled; ``scale`` is "fixed" if the method defines it, ``scale_dtype``
    concerns layout ``loftq`` only; ``stats`` is the sha256 of the file; ``device`` is the device
    type; ``kernels`` the variant of the inner loops (numerics.variant). ``layout_fallback`` says
    why layout auto had to leave its first choice while converting. ``structure`` is the sha256 of
    what transformers says of the tensors (families.anatomy), None if that changes nothing.
    ``backbone``: of an adapter for a backbone that exists, whether that is "named" or "held" in
    the output; else None.
    """

    threads: int
    layout_fallback: str | None
    kernels: str
    structure: str | None = None
    backbone: str | None = None

    @staticmethod
    def of(settings: Settings, **settled: Any) -> Recipe:
        """The recipe of ``settings``, with what the checkpoint and the machine have decided in
        their place."""
        return Recipe(**{**vars(settings), **settled})

    @staticmethod
    def read(held: Mapping[str, Any]) -> Recipe:
        """The recipe that a manifest holds, which may be from before there were all settings."""
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in held.items()}
        absent = {name: entry.absent for name, entry in entries().items() if not entry.required}
        return Recipe(**{**absent, **values})

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, as the manifest holds it."""
        values = asdict(self)
        for name in ("structure", "backbone"):
            if values[name] is None:
                del values[name]
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }

    def with_fallback(self) -> Recipe:
        """The recipe that layout auto continues with if a scale does not fit float16."""
        held = registry.holding_everything().name
        return replace(self, layout=held, layout_fallback="float16-range")


BEYOND: Mapping[str, Mapping[str, Any]] = {
    "kernels": {"type": "string", "pattern": "^[0-9]+:(native|tensor)\\+(bfloat16|float32)$"},
    "layout_fallback": {"enum": [None, "float16-range"]},
    "structure": {"$ref": "#/$defs/sha256"},
    "backbone": {"enum": ["named", "held"]},
}
"""What a recipe holds beside settings, with the schema of each."""


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a manifest's recipe, from the table of settings."""
    known = entries()
    properties = {name: entry.settled or entry.kind.schema() for name, entry in known.items()}
    required = [name for name, entry in known.items() if entry.required]
    return {
        "type": "object",
        "additionalProperties": False,
        "required": sorted([*required, "kernels", "layout_fallback"]),
        "properties": dict(sorted({**properties, **BEYOND}.items())),
    }


def settings_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that lead to a manifest's ``recipe`` again."""
    known = entries()
    held = {name: recipe[name] for name in known if recipe.get(name) not in (None, [])}
    for name, entry in known.items():  # of a manifest from before there was the setting
        if name not in recipe and not entry.required and entry.absent != entry.default:
            held[name] = entry.absent
    if held.get("scale") == "fixed":
        del held["scale"]
    if recipe.get("layout_fallback") is not None:
        held["layout"] = registry.AUTO  # and it will fall back as it did
    return held


def fingerprint(recipe: dict[str, Any], sources: list[tuple[str, int, str]]) -> str:
    """sha256 over the recipe and, per source file, (name, size, header sha256): never a path."""
    text = json.dumps(
        {"recipe": recipe, "sources": sorted(sources)}, sort_keys=True, separators=(",", ":")
    )
    return hashlib.sha256(text.encode()).hexdigest()
