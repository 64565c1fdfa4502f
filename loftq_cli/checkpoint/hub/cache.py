"""A model in the hub cache, as an earlier download left it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from loftq_cli.checkpoint.hub.errors import explained
from loftq_cli.checkpoint.hub.listing import (
    HubSnapshot,
    RemoteFile,
    Say,
    is_metas_layout,
    shard_names,
)
from loftq_cli.checkpoint.not_a_model import refuse_marked
from loftq_cli.checkpoint.source import CONFIG, INDEX, SINGLE
from loftq_cli.errors import EnvironmentFailure


def find_in_cache(repo_id: str, revision: str, say: Say) -> HubSnapshot:
    used, directory = repo_id, cached_directory(repo_id, revision)
    if directory is None or is_metas_layout([path.name for path in directory.iterdir()]):
        twin = f"{repo_id}-hf"
        if found := cached_directory(twin, revision):
            say(f"the hub cache has no weights of {repo_id}; using those of its twin {twin}")
            used, directory = twin, found
    hint = "run once with a connection, without --offline or HF_HUB_OFFLINE, to download it"
    if directory is None:
        at = f"{repo_id} at revision {revision}"
        raise EnvironmentFailure(
            f"{at} is not in the hub cache {constants.HF_HUB_CACHE}", hint=hint
        )
    refuse_marked(directory, used)
    if (directory / SINGLE).is_file():
        weights = [SINGLE]
    elif (directory / INDEX).is_file():
        weights = shard_names(directory / INDEX, used)
    else:
        weights = [f"{SINGLE} or {INDEX}"]
    if missing := [name for name in (CONFIG, *weights) if not (directory / name).is_file()]:
        raise EnvironmentFailure(
            f"{used} is not complete in the hub cache; missing: {', '.join(missing)}", hint=hint
        )
    shards = {name: _cached_file(directory / name) for name in weights}
    return HubSnapshot(directory, used, directory.name, None, shards)


def _cached_file(path: Path) -> RemoteFile:
    """The cache names a large file by its sha256, and links to it from the snapshot. Only that one
    link: the blob may be another to a store that several caches share, under another hash."""
    blob = Path(os.readlink(path)).name if path.is_symlink() else ""
    return RemoteFile(path.stat().st_size, blob if re.fullmatch("[0-9a-f]{64}", blob) else None)


def cached_directory(repo_id: str, revision: str | None) -> Path | None:
    # With no pattern the library says where the snapshot lies, not whether it is complete.
    with explained(repo_id, revision):
        try:
            return Path(
                snapshot_download(
                    repo_id, revision=revision, local_files_only=True, allow_patterns=[]
                )
            )
        except LocalEntryNotFoundError:
            return None
