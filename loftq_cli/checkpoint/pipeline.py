"""A pipeline of sentence-transformers: modules.json lists modules, each with a folder.

The first module is the model itself, in the directory or, of old pipelines, in a folder of its own;
the folders of the others hold a config and, of some (Dense), small weights, which belong to what
the pipeline computes. sentence-transformers reads ``path`` of every entry, relative to the
directory (base/model.py, _load_config_modules).
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

from loftq_cli.checkpoint.header import shown, strict_json
from loftq_cli.checkpoint.lfs import refuse_pointer
from loftq_cli.checkpoint.names import ADAPTER_FOLDER, is_plain_name
from loftq_cli.errors import CorruptFileError, SourceNotFoundError
from loftq_cli.machine.durable import readable

MODULES = "modules.json"
_LARGEST = 1_000_000
_SUFFIXES = (".json", ".txt", ".model", ".spm", ".tiktoken", ".safetensors")


def is_of_module(name: str) -> bool:
    """Whether a file of this name in a module's folder is copied: data, and no pickles."""
    return PurePosixPath(name).suffix in _SUFFIXES


def module_folders(directory: Path) -> tuple[str, ...]:
    """The folders that modules.json in ``directory`` names, with slashes; none if there is no
    such file, or it is of something else.

    Raises CorruptFileError if one is not a folder below the directory, or has a name that the
    output needs, and what :func:`modules` raises.
    """
    return tuple(
        sorted({path for entry in modules(directory) if (path := _path(directory, entry))})
    )


def modules(directory: Path) -> list[dict[str, Any]]:
    """The entries of modules.json; empty if there are none. Raises CorruptFileError if it
    is not JSON or is a pointer of git-lfs, sentence-transformers would fail; EnvironmentFailure if
    it cannot be read."""
    path = directory / MODULES
    try:
        with readable(path):
            if not path.is_file() or os.path.getsize(path) > _LARGEST:
                return []
            refuse_pointer(path)
            content = strict_json(path.read_bytes())
    except ValueError as error:
        raise CorruptFileError(
            f"{path}: not valid JSON: {error}", hint="download it again, or take the file away"
        ) from error
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        return []
    return content


def refuse_parent(directory: Path, repo_id: str | None = None) -> None:
    """Raise SourceNotFoundError if ``directory``, of the hub's ``repo_id`` or a user's own, is a
    pipeline that has its model in a folder below. Raises as :func:`module_folders` does."""
    entries = modules(directory)
    folder = _path(directory, entries[0]) if entries else None
    if folder is None:
        return
    give = f"give {directory / folder}"
    if repo_id is not None:
        give = f"download it (hf download {repo_id} --local-dir DIR) and give DIR/{folder}"
    others = len(entries) - 1
    without = f"without {MODULES}" + (f" and the {others} other modules" if others else "")
    raise SourceNotFoundError(
        f"{repo_id or directory} is a pipeline of sentence-transformers, and its model lies in "
        f"{folder}",
        hint=f"{give}; the output is then the model alone, {without}",
    )


def _path(directory: Path, entry: dict[str, Any]) -> str | None:
    path = entry.get("path")
    if not isinstance(path, str) or path in ("", "."):
        return None
    parts = path.rstrip("/").split("/")
    taken = parts[0] == ADAPTER_FOLDER or parts[0].endswith((".safetensors", ".json"))
    if taken or not all(map(is_plain_name, parts)):
        raise CorruptFileError(
            f"{directory / MODULES}: {shown(path)} is not a folder that a module can have",
            hint="correct the paths in it, or take the file away",
        )
    return "/".join(parts)
