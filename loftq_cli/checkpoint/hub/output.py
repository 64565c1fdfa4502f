"""A conversion, or a trained adapter, on the Hugging Face hub: its files into the hub cache."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from huggingface_hub import constants

from loftq_cli.checkpoint.header import shown
from loftq_cli.checkpoint.hub.cache import cached_directory
from loftq_cli.checkpoint.hub.listing import Listing, list_files
from loftq_cli.checkpoint.hub.transfer import download
from loftq_cli.checkpoint.names import ADAPTER_CONFIG
from loftq_cli.checkpoint.output import MANIFEST, read_manifest
from loftq_cli.checkpoint.source import CONFIG, INDEX, SINGLE
from loftq_cli.errors import (
    CorruptFileError,
    EnvironmentFailure,
    SourceNotFoundError,
    UnsupportedInputError,
    listed,
)

ADAPTER_WEIGHTS = "adapter_model.safetensors"


class Listener(Protocol):
    """What hears of a download; an Observer is one."""

    def note(self, text: str) -> None:
        """A one-line remark for the user."""

    def begin_download(self, total_bytes: int) -> None:
        """So much is not on disk yet, and comes now."""

    def downloaded(self, nbytes: int) -> None:
        """``nbytes`` more have arrived."""

    def end(self) -> None:
        """No more will come, whatever happened."""


def fetch_output(
    repo_id: str,
    revision: str | None,
    *,
    offline: bool,
    everything: bool,
    listener: Listener,
) -> Path:
    """The directory in the hub cache of a conversion, at one commit; its name is the commit's hash.

    ``everything``: all files that its manifest lists; otherwise the manifest and config.json.

    Raises SourceNotFoundError if the repository holds no conversion, CorruptFileError if it
    holds a part of one, VerificationError for a broken manifest, EnvironmentFailure (access,
    network, disk, an incomplete cache).
    """

    def names(manifest: Path) -> list[str]:
        held = [entry["name"] for entry in read_manifest(manifest)["outputs"]]
        return held if everything else [name for name in held if name == CONFIG]

    return _fetch(repo_id, revision, MANIFEST, names, _no_conversion, offline, listener)


def fetch_adapter(
    repo_id: str, *, revision: str | None = None, offline: bool, listener: Listener
) -> Path:
    """The directory in the hub cache of an adapter that PEFT saved, at one commit of the repository
    that it was sent to. Raises what :func:`fetch_output` does, and UnsupportedInputError if only
    pickled weights are there."""
    return _fetch(
        repo_id,
        revision,
        ADAPTER_CONFIG,
        lambda config: [ADAPTER_WEIGHTS],
        _no_adapter,
        offline,
        listener,
    )


def _fetch(
    repo_id: str,
    revision: str | None,
    first: str,
    names_in: Callable[[Path], list[str]],
    refuse: Callable[[Listing], None],
    offline: bool,
    listener: Listener,
) -> Path:
    """Bring the file ``first``, and those that it leads to, into the hub cache. ``refuse`` raises
    for a repository that has not got what is needed, and says what it has."""
    if offline or constants.HF_HUB_OFFLINE:
        return _find(repo_id, revision or "main", first, names_in)
    listing = list_files(repo_id, revision, listener.note)
    refuse(listing)
    if revision != listing.commit:
        # The library records in the cache which commit a name stands for: --offline finds it by it.
        download(repo_id, revision or "main", first)
    path = download(repo_id, listing.commit, first)
    directory, names = path.parent, names_in(path)
    if missing := [name for name in names if name not in listing.files]:
        raise CorruptFileError(
            f"{repo_id}: {first} leads to files that are not there: {_listed(missing)}",
            hint="the repository is incomplete; send the conversion again, with `loftq push`",
        )
    wanted = [name for name in names if not (directory / name).is_file()]
    listener.begin_download(sum(listing.files[name].size for name in wanted))
    try:
        for name in wanted:
            download(repo_id, listing.commit, name, progress=listener.downloaded)
    finally:
        listener.end()
    return directory


def _find(repo_id: str, revision: str, first: str, names_in: Callable[[Path], list[str]]) -> Path:
    directory = cached_directory(repo_id, revision)
    hint = "run once with a connection, without --offline or HF_HUB_OFFLINE, to download it"
    if directory is None:
        raise EnvironmentFailure(
            f"{repo_id} at revision {revision} is not in the hub cache {constants.HF_HUB_CACHE}",
            hint=hint,
        )
    path = directory / first
    wanted = [first, *(names_in(path) if path.is_file() else ())]
    if missing := [name for name in wanted if not (directory / name).is_file()]:
        raise EnvironmentFailure(
            f"{repo_id} is not complete in the hub cache; missing: {', '.join(missing)}", hint=hint
        )
    return directory


def _no_conversion(listing: Listing) -> None:
    repo_id, files = listing.repo_id, listing.files
    if MANIFEST in files:
        return
    if ADAPTER_CONFIG in files:
        what = "a PEFT adapter"
        hint = f"`loftq merge DIR --adapter {repo_id}` merges it with the conversion it is of"
    elif SINGLE in files or INDEX in files:
        what = "a model, and not a conversion"
        hint = f"`loftq convert {repo_id}` makes one of it"
    else:
        what = _holding(files)
        hint = "give the id of a repository that `loftq push` sent a conversion to"
    raise SourceNotFoundError(f"{repo_id} has no {MANIFEST} at this revision: {what}", hint=hint)


def _no_adapter(listing: Listing) -> None:
    repo_id, files = listing.repo_id, listing.files
    if ADAPTER_CONFIG in files and ADAPTER_WEIGHTS in files:
        return
    if ADAPTER_CONFIG in files and "adapter_model.bin" in files:
        raise UnsupportedInputError(
            f"{repo_id} holds only pickled weights (adapter_model.bin)",
            hint="save the adapter with safetensors first: save_pretrained(DIR)",
        )
    missing = ADAPTER_WEIGHTS if ADAPTER_CONFIG in files else ADAPTER_CONFIG
    what = "a conversion, and not an adapter" if MANIFEST in files else _holding(files)
    hint = "give the id of a repository that PEFT's push_to_hub sent an adapter to"
    if MANIFEST in files:
        hint = f"`loftq merge {repo_id}` merges it with the adapter that lies in it"
    raise SourceNotFoundError(f"{repo_id} has no {missing} at this revision: {what}", hint=hint)


def _holding(files: Collection[str]) -> str:
    named = sorted(name for name in files if not name.startswith("."))
    return f"it holds {_listed(named)}" if named else "it is empty"


def _listed(names: list[str]) -> str:
    return listed([shown(name) for name in names])
