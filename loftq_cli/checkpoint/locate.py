"""What a model, a conversion or an adapter is named by, a path or a hub id, to its files."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli.checkpoint.decoding.find import decoded
from loftq_cli.checkpoint.not_a_model import refuse_marked, refuse_unmerged
from loftq_cli.checkpoint.output import MANIFEST
from loftq_cli.checkpoint.quantized import refuse_quantized
from loftq_cli.checkpoint.request import Request
from loftq_cli.checkpoint.source import Source, open_source
from loftq_cli.checkpoint.supply import Commit
from loftq_cli.errors import EnvironmentFailure, SourceNotFoundError, UsageError
from loftq_cli.machine.paths import expanded

if TYPE_CHECKING:
    from loftq_cli.checkpoint.hub.output import Listener


def locate(request: Request, say: Callable[[str], None]) -> Source:
    """The source that ``request`` names: a path if it exists or starts with ``.``, ``/`` or ``~``,
    else a hub id. A hub's shards may not be there yet: ``supply`` brings them. ``say`` gets one
    line about each thing that is not as it was asked for.

    Raises UsageError for a revision of a directory; InputError for a bad checkpoint, or one that is
    quantized in a form that is not read, or an adapter, or a conversion of ours; EnvironmentFailure
    for hub access.
    """
    return _in_full_precision(opened(request, say))


def opened(request: Request, say: Callable[[str], None], *, ours: bool = False) -> Source:
    """The checkpoint that ``request`` names as :func:`locate` finds it, its tensors as they are
    stored. ``ours``: a directory may be a conversion of ours. Raises as :func:`locate`."""
    model = request.model
    if is_path(model):
        _refuse_revision(model, request.revision)
        path = expanded(model)
        if not (ours and os.path.exists(path / MANIFEST)):
            refuse_marked(path, model)
        source = open_source(path, source_id=model, allow_pickle=request.allow_pickle)
        refuse_unmerged(source)
        return source
    # Imported here: a local conversion needs no hub client.
    from loftq_cli.checkpoint.hub import repository, shards
    from loftq_cli.checkpoint.hub.listing import looks_like_hub_id

    if not looks_like_hub_id(model):
        raise SourceNotFoundError(f"{model}: no such directory, and not a hub id")
    snapshot = repository.fetch(request, say)
    source = open_source(
        snapshot.directory,
        source_id=snapshot.repo_id,
        revision=snapshot.revision,
        requested_revision=request.revision,
        resolved_from=snapshot.resolved_from,
        supply=shards.HubSupply(snapshot, request.passing),
        left=snapshot.left_behind,
    )
    refuse_unmerged(source)
    return source


def _in_full_precision(source: Source) -> Source:
    """The source, decoded if it is quantized itself. Raises UnsupportedInputError if it is not
    what can be converted."""
    source = decoded(source)
    refuse_quantized(source)
    return source


def is_path(model: str) -> bool:
    """Whether MODEL is a directory's path, and not a hub id."""
    return model.startswith((".", "/", "~")) or os.path.exists(model)


@dataclass(frozen=True)
class Place:
    """Where a conversion lies: ``directory``, and where that is in the hub cache, the commit whose
    files those are, and the ``revision`` that was asked for."""

    directory: Path
    repository: Commit | None = None
    revision: str | None = None


def locate_output(
    place: str | os.PathLike[str],
    *,
    revision: str | None = None,
    offline: bool = False,
    everything: bool,
    listener: Listener,
) -> Place:
    """Where the conversion ``place`` lies: at that path, or, if there is none and it has the
    form OWNER/NAME, in the hub cache, to which its files are downloaded: ``everything``, or what
    its manifest alone answers.

    Raises UsageError for a revision of a directory, InputError for a repository without a
    conversion, EnvironmentFailure for hub access. A directory is not looked into.
    """
    if not _is_on_hub(place):
        _refuse_revision(place, revision)
        return Place(expanded(place))
    from loftq_cli.checkpoint.hub.output import fetch_output

    repo_id = str(place)
    try:
        found = fetch_output(
            repo_id, revision, offline=offline, everything=everything, listener=listener
        )
    except EnvironmentFailure as error:
        raise _neither(repo_id, error) from error
    return Place(found, Commit(repo_id, found.name), revision)


def locate_adapter(
    place: str | os.PathLike[str], *, offline: bool = False, listener: Listener
) -> Path:
    """Where the adapter ``place`` lies, as :func:`locate_output`; raises the same."""
    if not _is_on_hub(place):
        return expanded(place)
    from loftq_cli.checkpoint.hub.output import fetch_adapter

    try:
        return fetch_adapter(str(place), offline=offline, listener=listener)
    except EnvironmentFailure as error:
        raise _neither(str(place), error) from error


def _is_on_hub(place: str | os.PathLike[str]) -> bool:
    """Whether ``place`` is the id of a repository: OWNER/NAME and no path that exists, nor that of
    unfinished work. A Path object is a path."""
    if not isinstance(place, str) or is_path(place) or place.count("/") != 1:
        return False
    from loftq_cli.checkpoint.hub.listing import looks_like_hub_id

    owner, name = place.split("/")
    return not os.path.exists(f"{owner}/.{name}.loftq-partial") and looks_like_hub_id(place)


def _refuse_revision(place: str | os.PathLike[str], revision: str | None) -> None:
    if revision is not None:
        raise UsageError(
            f"--revision {revision} is for what lies on the hub, and {place} is a path",
            hint="leave the option out",
        )


def _neither(repo_id: str, error: EnvironmentFailure) -> EnvironmentFailure:
    """What a mistyped path needs to hear as well."""
    return EnvironmentFailure(
        f"there is no directory {repo_id}; as a hub id: {error.message}", hint=error.hint
    )
