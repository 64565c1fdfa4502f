"""A model on the Hugging Face hub: which commit, which files, and the small ones among them.

The revision is resolved to one commit, and of that commit only what a conversion reads is
downloaded: here configuration, tokenizer and index, into the hub cache; the weights when they are
needed (hub_shards.py). Cache, tokens, retries and proxies are huggingface_hub's.

Small files come first and the weights last, so that a snapshot with all of its weights is a
complete one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from loftq_cli.checkpoint.companions import is_companion, left_behind
from loftq_cli.checkpoint.header import strict_json
from loftq_cli.checkpoint.hub.errors import explained
from loftq_cli.checkpoint.hub.patience import patiently
from loftq_cli.checkpoint.hub.transfer import download
from loftq_cli.checkpoint.names import is_plain_name
from loftq_cli.checkpoint.not_a_model import MARKERS, refuse_bare_adapter, refuse_marked
from loftq_cli.checkpoint.pipeline import MODULES, module_folders, refuse_parent
from loftq_cli.checkpoint.request import Request
from loftq_cli.checkpoint.source import CONFIG, INDEX, SINGLE
from loftq_cli.checkpoint.strays import too_much
from loftq_cli.checkpoint.supply import Commit
from loftq_cli.errors import (
    CorruptFileError,
    EnvironmentFailure,
    SourceNotFoundError,
    UnsupportedInputError,
)

_MOST_REQUESTS = 20  # pull requests that are looked at, newest first

_Say = Callable[[str], None]


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


def fetch(request: Request, say: _Say) -> HubSnapshot:
    """Bring a model's configuration, tokenizer and index into the hub cache, and list its weights.

    The revision may be a branch, tag, pull request reference or commit, by default the main branch.
    Offline, or if ``HF_HUB_OFFLINE`` is set, only the cache is used, and all weights must be in it.
    A repository that holds Meta's original files gives way to its twin ``<id>-hf``, at the same
    revision. ``say`` gets one line about each of these.

    Raises ``SourceNotFoundError`` (no hub id, no weights), ``UnsupportedInputError`` (only pickled
    weights), ``CorruptFileError`` (a broken or hostile index) and ``EnvironmentFailure`` (access,
    network, disk, an incomplete cache).
    """
    repo_id = request.model
    if not looks_like_hub_id(repo_id):
        raise SourceNotFoundError(
            f"{repo_id!r} is neither a path that exists nor a hub id",
            hint="a hub id is NAME or OWNER/NAME, such as meta-llama/Llama-2-7b",
        )
    if request.offline or constants.HF_HUB_OFFLINE:
        at = request.pinned or Commit(repo_id, request.revision or "main")
        found = _find_in_cache(at.repo_id, at.revision, say)
    else:
        found = _download_small(request, say)
    return replace(found, resolved_from=repo_id if found.repo_id != repo_id else None)


def _download_small(request: Request, say: _Say) -> HubSnapshot:
    listing, revision = _listing(request, say)
    entry = _check_listing(listing)
    if revision != listing.commit:
        # Once under the revision's own name: the library then records in the cache which commit
        # that is, and a later offline run, ours or another tool's, finds the snapshot by it.
        download(listing.repo_id, revision or "main", CONFIG)
    # config.json first: there is no snapshot directory before its first file.
    directory = download(listing.repo_id, listing.commit, CONFIG).parent
    small = _companions(listing, directory)
    for name in small:
        download(listing.repo_id, listing.commit, name)
    names = _names_of_shards(listing, entry)
    shards = {name: listing.files[name] for name in names}
    left = left_behind(listing.files, {CONFIG, entry, *small, *names})
    return HubSnapshot(directory, listing.repo_id, listing.commit, None, shards, left)


def _listing(request: Request, say: _Say) -> tuple[Listing, str | None]:
    """The files of what is asked for, of its twin, or of the commit that earlier work was begun
    with; and the revision that they were found at."""
    repo_id, revision, pinned = request.model, request.revision, request.pinned
    listing = list_files(repo_id, revision, say)
    if _is_metas_layout(listing.files):
        listing = _twin_of(repo_id, revision, say)
    if pinned is None or pinned == Commit(listing.repo_id, listing.commit):
        return listing, revision
    say(
        f"{listing.repo_id} is at {listing.commit} by now; the unfinished conversion goes on "
        f"with {pinned.revision} (--overwrite starts again)"
    )
    return list_files(pinned.repo_id, pinned.revision, say), pinned.revision


def _twin_of(repo_id: str, revision: str | None, say: _Say) -> Listing:
    twin = f"{repo_id}-hf"
    with explained(twin, revision):
        exists = patiently(lambda: HfApi().repo_exists(twin), say)
    if not exists:
        raise SourceNotFoundError(
            f"{repo_id} holds Meta's original files, and there is no {twin} to use instead",
            hint="give the id of a repository with the same model in safetensors format",
        )
    say(f"{repo_id} holds Meta's original files; using its twin {twin}")
    return list_files(twin, revision, say)


def _check_listing(listing: Listing) -> str:
    """The file by which the weights are found. Raises InputError if this is no model."""
    for name in MARKERS:
        if name in listing.files:
            found = download(listing.repo_id, listing.commit, name)
            refuse_marked(found.parent, listing.repo_id, listing.files)
    refuse_bare_adapter(listing.repo_id, listing.files)
    entry = _entry_to_weights(listing)
    if CONFIG not in listing.files:
        raise SourceNotFoundError(
            f"{listing.repo_id} has no {CONFIG} at this revision",
            hint="give the id of a repository with a transformers model in safetensors format",
        )
    return entry


def _names_of_shards(listing: Listing, entry: str) -> list[str]:
    """The files of the weights. Raises CorruptFileError if one is missing."""
    if entry != INDEX:
        return [SINGLE]
    names = _shards(download(listing.repo_id, listing.commit, INDEX), listing.repo_id)
    if missing := [name for name in names if name not in listing.files]:
        raise CorruptFileError(
            f"{listing.repo_id}: {INDEX} names files that are not there: {', '.join(missing)}",
            hint="the repository is incomplete; another --revision may be whole",
        )
    return names


def _companions(listing: Listing, directory: Path) -> list[str]:
    """The files to copy as they are. modules.json is brought into ``directory`` first, to see what
    it names. Raises CorruptFileError if they are too large or too many."""
    if MODULES in listing.files:
        _modules_file(listing)
    folders = module_folders(directory)
    small = sorted(n for n in listing.files if n != CONFIG and is_companion(n, folders))
    _check_amount(listing, small)
    return small


def _modules_file(listing: Listing) -> Path:
    _check_amount(listing, [MODULES])
    return download(listing.repo_id, listing.commit, MODULES)


def _check_amount(listing: Listing, names: Collection[str]) -> None:
    if faults := too_much((name, listing.files[name].size) for name in names):
        raise CorruptFileError(
            f"{listing.repo_id}: {'; '.join(faults)}",
            hint="download the model (hf download), take away what is not needed, and convert "
            "the directory",
        )


def _find_in_cache(repo_id: str, revision: str, say: _Say) -> HubSnapshot:
    used, directory = repo_id, cached_directory(repo_id, revision)
    if directory is None or _is_metas_layout([path.name for path in directory.iterdir()]):
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
        weights = _shards(directory / INDEX, used)
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


def list_files(repo_id: str, revision: str | None, say: _Say) -> Listing:
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


def _is_metas_layout(names: Collection[str]) -> bool:
    """``params.json`` and ``consolidated.*.pth``, and not a transformers model beside them."""
    if "params.json" not in names or SINGLE in names or INDEX in names:
        return False
    return any(fnmatchcase(name, "consolidated*.pth") for name in names)


def _entry_to_weights(listing: Listing) -> str:
    """The file that leads to the weights; a single file first, as transformers does."""
    for name in (SINGLE, INDEX):
        if name in listing.files:
            return name
    if any(fnmatchcase(name, "pytorch_model*.bin") for name in listing.files):
        found = _converted_at(listing.repo_id)
        local = (
            f"download it (hf download {listing.repo_id} --local-dir DIR) and convert the directory"
        )
        hint = (
            f"use --revision {found}, a pull request that has safetensors; or {local} with "
            "--allow-pickle"
        )
        if found is None:
            hint = (
                f"{local} with --allow-pickle; a pull request with "
                f"safetensors is used by --revision refs/pr/N, and none was found at "
                f"{constants.ENDPOINT}/{listing.repo_id}/discussions"
            )
        raise UnsupportedInputError(
            f"{listing.repo_id} has only pickled weights (pytorch_model*.bin) at this revision",
            hint=hint,
        )
    if MODULES in listing.files:
        refuse_parent(_modules_file(listing).parent, listing.repo_id)
    raise SourceNotFoundError(
        f"{listing.repo_id} has neither {SINGLE} nor {INDEX} at this revision",
        hint="give the id of a repository with a transformers model in safetensors format",
    )


def _converted_at(repo_id: str) -> str | None:
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


def _shards(index: Path, repo_id: str) -> list[str]:
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
