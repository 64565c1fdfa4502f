"""What the hub says of a repository: its files at one commit, and which of them are weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from loftq_cli.checkpoint.header import strict_json
from loftq_cli.checkpoint.hub.errors import explained
from loftq_cli.checkpoint.hub.patience import patiently
from loftq_cli.checkpoint.names import is_plain_name
from loftq_cli.checkpoint.source import INDEX, SINGLE
from loftq_cli.errors import CorruptFileError

_MOST_REQUESTS = 20  # pull requests that are looked at, newest first

Say = Callable[[str], None]
"""Receives remarks for the user, a line each."""


@dataclass(frozen=True)
class RemoteFile:
    """What the hub says of a file: its size in bytes and its sha256, None for a small file."""

    size: int
    sha256: str | None


@dataclass(frozen=True)
class HubSnapshot:
    """One commit of a hub repository, in the hub cache.

    ``directory`` holds the small files, ``repo_id`` is the repository whose files they are,
    ``revision`` its commit hash, and ``resolved_from`` the id that was asked for if the twin
    ``<id>-hf`` was used instead. ``shards`` are the files of the weights, which may not be there
    yet. ``left_behind`` are the repository's other files, if they are known.
    """

    directory: Path
    repo_id: str
    revision: str
    resolved_from: str | None
    shards: Mapping[str, RemoteFile] = field(default_factory=dict)
    left_behind: tuple[str, ...] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Listing:
    """A repository's files at one commit."""

    repo_id: str
    commit: str
    files: dict[str, RemoteFile]


def looks_like_hub_id(text: str) -> bool:
    """Whether ``text`` has the form of a hub id, ``name`` or ``owner/name``."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def list_files(repo_id: str, revision: str | None, say: Say) -> Listing:
    def ask() -> ModelInfo:
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        return HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout)

    with explained(repo_id, revision):
        info = patiently(ask, say)
        if info.sha is None:
            raise ValueError("the answer names no commit")
        files = {
            file.rfilename: RemoteFile(file.size or 0, file.lfs.sha256 if file.lfs else None)
            for file in info.siblings or ()
        }
    return Listing(repo_id, info.sha, files)


def is_metas_layout(names: Collection[str]) -> bool:
    """``params.json`` and ``consolidated.*.pth``, and not a transformers model beside them."""
    if "params.json" not in names or SINGLE in names or INDEX in names:
        return False
    return any(fnmatchcase(name, "consolidated*.pth") for name in names)


def shard_names(index: Path, repo_id: str) -> list[str]:
    """The shards that an index names. Whatever is not a plain safetensors name is refused."""
    with explained(repo_id, None, INDEX):
        raw = index.read_bytes()
    try:
        names = set(strict_json(raw)["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{repo_id}: {INDEX} is not a safetensors index") from error
    refused = [repr(name) for name in names if not _is_shard_name(name)]
    if refused or not names:
        named = ", ".join(sorted(refused)) or "nothing"
        raise CorruptFileError(f"{repo_id}: {INDEX} must name safetensors files, not {named}")
    return sorted(names)


def _is_shard_name(name: object) -> bool:
    return isinstance(name, str) and is_plain_name(name) and name.endswith(".safetensors")


def converted_at(repo_id: str) -> str | None:
    """The newest pull request, of those looked at, with weights in safetensors."""
    api, timeout = HfApi(), constants.HF_HUB_ETAG_TIMEOUT
    with suppress(Exception):  # it is only for a hint
        requests = api.list_repo_refs(repo_id, include_pull_requests=True).pull_requests or ()
        numbers = sorted((int(each.ref.rpartition("/")[2]) for each in requests), reverse=True)
        for ref in (f"refs/pr/{number}" for number in numbers[:_MOST_REQUESTS]):
            siblings = api.model_info(repo_id, revision=ref, timeout=timeout).siblings or ()
            if {SINGLE, INDEX} & {file.rfilename for file in siblings}:
                return ref
    return None
