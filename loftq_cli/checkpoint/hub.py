"""A model on the Hugging Face hub, as a directory in the hub cache.

The revision is resolved to one commit, and of that commit only what a conversion reads is
downloaded: configuration, tokenizer and safetensors weights. Cache, tokens, retries, proxies and
progress bars are huggingface_hub's; this module chooses the files and checks what arrived.

Small files come first and the weights last, so that a snapshot with all of its weights is a
complete one. Weights come one after the other, each checked against the hub's sha256 before use.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from loftq_cli.checkpoint.companions import is_companion
from loftq_cli.checkpoint.durable import file_sha256
from loftq_cli.checkpoint.header import strict_json
from loftq_cli.checkpoint.hub_errors import explained
from loftq_cli.checkpoint.source import CONFIG, INDEX, SINGLE, is_plain_name
from loftq_cli.errors import (
    CorruptFileError,
    EnvironmentFailure,
    SourceNotFoundError,
    UnsupportedInputError,
)

_Say = Callable[[str], None]


@dataclass(frozen=True)
class HubSnapshot:
    """One commit of a hub repository, in the hub cache.

    ``directory`` holds the files, ``repo_id`` is the repository whose files they are,
    ``revision`` its commit hash, and ``resolved_from`` the id that was asked for where the twin
    ``<id>-hf`` was used instead.
    """

    directory: Path
    repo_id: str
    revision: str
    resolved_from: str | None


@dataclass(frozen=True)
class _Listing:
    """A repository's files at one commit, each with the hub's sha256 (None for small files)."""

    repo_id: str
    commit: str
    sha256: dict[str, str | None]


def looks_like_hub_id(text: str) -> bool:
    """Whether ``text`` has the form of a hub id, ``name`` or ``owner/name``."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def fetch(
    repo_id: str,
    revision: str | None = None,
    *,
    offline: bool = False,
    say: _Say,
) -> HubSnapshot:
    """Bring a model's configuration, tokenizer and safetensors weights into the hub cache.

    ``revision`` is a branch, tag, pull request reference or commit, by default the main branch.
    With ``offline``, or where ``HF_HUB_OFFLINE`` is set, only the cache is used. A repository
    that holds Meta's original files gives way to its twin ``<id>-hf``, at the same revision, and
    ``say`` gets one line about it.

    Raises ``SourceNotFoundError`` (no hub id, no weights), ``UnsupportedInputError`` (only pickled
    weights), ``CorruptFileError`` (a broken or hostile index, a wrong size or hash) and
    ``EnvironmentFailure`` (access, network, disk, an incomplete cache).
    """
    if not looks_like_hub_id(repo_id):
        raise SourceNotFoundError(
            f"{repo_id!r} is neither a path that exists nor a hub id",
            hint="a hub id is NAME or OWNER/NAME, such as meta-llama/Llama-2-7b",
        )
    if offline or constants.HF_HUB_OFFLINE:
        used, directory = _find_in_cache(repo_id, revision, say)
    else:
        used, directory = _download_all(repo_id, revision, say)
    return HubSnapshot(directory, used, directory.name, repo_id if used != repo_id else None)


def _download_all(repo_id: str, revision: str | None, say: _Say) -> tuple[str, Path]:
    listing = _list_files(repo_id, revision)
    if _is_metas_layout(listing.sha256):
        twin = f"{repo_id}-hf"
        with explained(twin, revision):
            exists = HfApi().repo_exists(twin)
        if not exists:
            raise SourceNotFoundError(
                f"{repo_id} holds Meta's original files, and there is no {twin} to use instead",
                hint="give the id of a repository with the same model in safetensors format",
            )
        say(f"{repo_id} holds Meta's original files; using its twin {twin}")
        listing = _list_files(twin, revision)

    entry = _entry_to_weights(listing)
    companions = sorted(name for name in listing.sha256 if is_companion(name))
    if revision != listing.commit:
        # Once under the revision's own name: the library then records in the cache which commit
        # that is, and a later offline run, ours or another tool's, finds the snapshot by it.
        with explained(listing.repo_id, revision):
            hf_hub_download(listing.repo_id, [*companions, entry][0], revision=revision)
    for name in companions:
        _download(listing, name)
    path = _download(listing, entry)
    if entry == INDEX:
        shards = _shards(path, listing.repo_id)
        if missing := [name for name in shards if name not in listing.sha256]:
            raise CorruptFileError(
                f"{listing.repo_id}: {INDEX} names files that are not there: {', '.join(missing)}",
                hint="the repository is incomplete; another --revision may be whole",
            )
        for name in shards:
            _download(listing, name)
    return listing.repo_id, path.parent


def _find_in_cache(repo_id: str, revision: str | None, say: _Say) -> tuple[str, Path]:
    used, directory = repo_id, _cached_directory(repo_id, revision)
    if directory is None or _is_metas_layout([path.name for path in directory.iterdir()]):
        twin = f"{repo_id}-hf"
        if found := _cached_directory(twin, revision):
            say(f"the hub cache has no weights of {repo_id}; using those of its twin {twin}")
            used, directory = twin, found
    hint = "run once with a connection, without --offline or HF_HUB_OFFLINE, to download it"
    if directory is None:
        at = f"{repo_id} at revision {revision or 'main'}"
        raise EnvironmentFailure(
            f"{at} is not in the hub cache {constants.HF_HUB_CACHE}", hint=hint
        )
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
    return used, directory


def _cached_directory(repo_id: str, revision: str | None) -> Path | None:
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


def _list_files(repo_id: str, revision: str | None) -> _Listing:
    with explained(repo_id, revision):
        info = HfApi().model_info(
            repo_id, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        if info.sha is None:
            raise ValueError("the answer names no commit")
    files = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or ()}
    return _Listing(repo_id, info.sha, files)


def _is_metas_layout(names: Collection[str]) -> bool:
    """``params.json`` and ``consolidated.*.pth``, and not a transformers model beside them."""
    if "params.json" not in names or SINGLE in names or INDEX in names:
        return False
    return any(fnmatchcase(name, "consolidated*.pth") for name in names)


def _entry_to_weights(listing: _Listing) -> str:
    """The file that leads to the weights; a single file first, as transformers does."""
    for name in (SINGLE, INDEX):
        if name in listing.sha256:
            return name
    if any(fnmatchcase(name, "pytorch_model*.bin") for name in listing.sha256):
        raise UnsupportedInputError(
            f"{listing.repo_id} has only pickled weights (pytorch_model*.bin) at this revision",
            hint="a pull request with a safetensors conversion may exist: look at "
            f"{constants.ENDPOINT}/{listing.repo_id}/discussions and use --revision refs/pr/N",
        )
    raise SourceNotFoundError(
        f"{listing.repo_id} has neither {SINGLE} nor {INDEX} at this revision",
        hint="give the id of a repository with a transformers model in safetensors format",
    )


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


def _download(listing: _Listing, name: str) -> Path:
    repo_id, commit = listing.repo_id, listing.commit
    with explained(repo_id, commit, name):
        was_cached = isinstance(try_to_load_from_cache(repo_id, name, revision=commit), str)
        path = Path(hf_hub_download(repo_id, name, revision=commit))
        expected = listing.sha256[name]
        if expected is None or was_cached or file_sha256(path) == expected:
            return path
        path.resolve().unlink()  # or the next run would take it for the right one
        path.unlink(missing_ok=True)
    message = f"{name} of {repo_id} arrived damaged: its sha256 is not the hub's"
    raise CorruptFileError(message, hint="it was removed from the cache; run the command again")
