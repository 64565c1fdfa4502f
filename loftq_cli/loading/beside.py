"""The adapter that lies beside a backbone, as PEFT will try to attach it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from loftq_cli.checkpoint.output import MANIFEST
from loftq_cli.layouts import adapter


def adapter_targets(config: Any) -> list[str]:
    """The ``target_modules`` of the adapter in the ``loftq_init`` of the directory, or hub id, that
    ``config`` (a transformers configuration) was loaded from; none if there is no such adapter."""
    targets = _beside(config, adapter.CONFIG, adapter.DIRECTORY).get("target_modules")
    return [str(name) for name in targets] if isinstance(targets, list) else []


def is_merged(config: Any) -> bool:
    """Whether a trained adapter was merged into the codes of the directory, or hub id, that
    ``config`` (a transformers configuration) was loaded from: then none belongs to them."""
    exported = _beside(config, MANIFEST).get("exported")
    return isinstance(exported, dict) and "merged" in exported


def _beside(config: Any, name: str, folder: str = "") -> dict[str, Any]:
    """What a JSON file beside the backbone says; nothing if it is not there, or says no object."""
    from transformers.utils import cached_file

    try:
        file = cached_file(
            config._name_or_path,
            name,
            subfolder=folder,
            revision=getattr(config, "_commit_hash", None),
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        with open(file, encoding="utf-8") as stream:
            found = json.load(stream)
    except (OSError, TypeError, ValueError, LookupError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def lost_targets(
    targets: Collection[str], mapping: Mapping[str, str], present: Collection[str]
) -> list[str]:
    """Those of ``targets`` that PEFT would not find, or whose tensors it would not load: it looks
    for modules by the ends of their names, and renames tensors by the patterns of ``mapping``."""
    return [target for target in targets if not _attaches(target, mapping, present)]


def _attaches(target: str, mapping: Mapping[str, str], present: Collection[str]) -> bool:
    name = f"{target}."
    for pattern, replacement in mapping.items():
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            name = renamed
            break
    name = name.removesuffix(".")
    return name in present and (name == target or name.endswith(f".{target}"))
