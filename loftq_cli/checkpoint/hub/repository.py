"""A model on the Hugging Face hub: which commit, which files, and the small ones among them.

The revision is resolved to one commit, and of that commit only what a conversion reads is
downloaded: here configuration, tokenizer and index, into the hub cache; the weights when they are
needed (shards.py). Cache, tokens, retries and proxies are huggingface_hub's.

Small files come first and the weights last, so that a snapshot with all of its weights is a
complete one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, constants

from loftq_cli.checkpoint.companions import is_companion, left_behind
from loftq_cli.checkpoint.hub.cache import find_in_cache
from loftq_cli.checkpoint.hub.errors import explained
from loftq_cli.checkpoint.hub.listing import (
    HubSnapshot,
    Listing,
    Say,
    converted_at,
    is_metas_layout,
    list_files,
    looks_like_hub_id,
    shard_names,
)
from loftq_cli.checkpoint.hub.patience import patiently
from loftq_cli.checkpoint.hub.transfer import download
from loftq_cli.checkpoint.not_a_model import MARKERS, refuse_bare_adapter, refuse_marked
from loftq_cli.checkpoint.pipeline import MODULES, module_folders, refuse_parent
from loftq_cli.checkpoint.request import Request
from loftq_cli.checkpoint.source import CONFIG, INDEX, SINGLE
from loftq_cli.checkpoint.strays import too_much
from loftq_cli.checkpoint.supply import Commit
from loftq_cli.errors import CorruptFileError, SourceNotFoundError, UnsupportedInputError


def fetch(request: Request, say: Say) -> HubSnapshot:
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
        found = find_in_cache(at.repo_id, at.revision, say)
    else:
        found = _download_small(request, say)
    return replace(found, resolved_from=repo_id if found.repo_id != repo_id else None)


def _download_small(request: Request, say: Say) -> HubSnapshot:
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
    names = _names_ofshard_names(listing, entry)
    shards = {name: listing.files[name] for name in names}
    left = left_behind(listing.files, {CONFIG, entry, *small, *names})
    return HubSnapshot(directory, listing.repo_id, listing.commit, None, shards, left)


def _listing(request: Request, say: Say) -> tuple[Listing, str | None]:
    """The files of what is asked for, of its twin, or of the commit that earlier work was begun
    with; and the revision that they were found at."""
    repo_id, revision, pinned = request.model, request.revision, request.pinned
    listing = list_files(repo_id, revision, say)
    if is_metas_layout(listing.files):
        listing = _twin_of(repo_id, revision, say)
    if pinned is None or pinned == Commit(listing.repo_id, listing.commit):
        return listing, revision
    say(
        f"{listing.repo_id} is at {listing.commit} by now; the unfinished conversion goes on "
        f"with {pinned.revision} (--overwrite starts again)"
    )
    return list_files(pinned.repo_id, pinned.revision, say), pinned.revision


def _twin_of(repo_id: str, revision: str | None, say: Say) -> Listing:
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


def _names_ofshard_names(listing: Listing, entry: str) -> list[str]:
    """The files of the weights. Raises CorruptFileError if one is missing."""
    if entry != INDEX:
        return [SINGLE]
    names = shard_names(download(listing.repo_id, listing.commit, INDEX), listing.repo_id)
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


def _entry_to_weights(listing: Listing) -> str:
    """The file that leads to the weights; a single file first, as transformers does."""
    for name in (SINGLE, INDEX):
        if name in listing.files:
            return name
    if any(fnmatchcase(name, "pytorch_model*.bin") for name in listing.files):
        found = converted_at(listing.repo_id)
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
