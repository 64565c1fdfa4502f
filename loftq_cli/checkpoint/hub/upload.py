"""A directory to a repository on the hub, through huggingface_hub's own folder upload.

``upload_folder`` commits in batches, leaves nothing beside the files that it sends, and goes on
where an earlier call was stopped: what is there already is not sent again. ``upload_large_folder``
of earlier clients writes its state into the directory, and later ones do not have it.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData, ModelInfo, constants, get_token

from loftq_cli.checkpoint.hub.errors import explained
from loftq_cli.checkpoint.hub.patience import patiently
from loftq_cli.errors import EnvironmentFailure, OutputConflictError

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


@dataclass(frozen=True)
class Pushed:
    """What was sent: the repository, the branch, the commit, whether it is private."""

    repo_id: str
    revision: str
    commit: str
    url: str
    private: bool


def front_matter(fields: Mapping[str, Any]) -> str:
    """The metadata of a model card, as its first lines; fields that are None are left out."""
    return f"---\n{ModelCardData(**fields).to_yaml()}\n---\n"


def push_folder(
    folder: Path,
    names: Collection[str],
    repo_id: str,
    *,
    marker: str,
    private: bool,
    revision: str | None,
    message: str,
    say: Callable[[str], None],
) -> Pushed:
    """Make the repository ``repo_id`` (and the branch ``revision``) if it is not there, and
    bring the files ``names`` of ``folder`` into it.

    Weights that are in the repository under other names are deleted with it if it holds a file
    ``marker``; else OutputConflictError. So it is for a public repository if ``private`` is
    asked for. Raises EnvironmentFailure (no token, access, network).
    """
    _check_access()
    api, branch = HfApi(), revision or constants.DEFAULT_REVISION

    def look() -> ModelInfo:
        return api.model_info(repo_id, revision=branch, timeout=constants.HF_HUB_ETAG_TIMEOUT)

    with explained(repo_id, branch, sending=True):
        patiently(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True), say)
        if revision is not None and not revision.startswith("refs/"):
            patiently(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True), say)
        info = patiently(look, say)
    if private and not info.private:
        raise OutputConflictError(
            f"{repo_id} is there already, and it is public",
            hint="choose another REPO_ID, or make it private in its settings",
        )
    other = _other_weights(repo_id, info, names, marker)
    with explained(repo_id, branch, sending=True):
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=branch,
            commit_message=message,
            delete_patterns=[glob.escape(name) for name in other] or None,
        )
    url = f"{constants.ENDPOINT}/{repo_id}"
    return Pushed(repo_id, branch, commit.oid, url, bool(info.private))


def _check_access() -> None:
    if constants.HF_HUB_OFFLINE:
        raise EnvironmentFailure("HF_HUB_OFFLINE is set", hint="unset it to send something")
    if get_token() is None:
        raise EnvironmentFailure(
            f"there is no token for {constants.ENDPOINT}",
            hint="log in with `hf auth login`, or set HF_TOKEN to a token that may write",
        )


def _other_weights(repo_id: str, info: ModelInfo, names: Collection[str], marker: str) -> list[str]:
    """Weights of an earlier conversion, under other names than ``names``. Raises
    OutputConflictError if they are of something else."""
    there = {file.rfilename for file in info.siblings or ()}
    other = sorted(name for name in there - set(names) if name.endswith(_WEIGHTS))
    if other and marker not in there:
        raise OutputConflictError(
            f"{repo_id} holds weights of something else: {', '.join(other[:3])}",
            hint="choose another REPO_ID or --revision",
        )
    return other
