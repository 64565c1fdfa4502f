"""MODEL to a checked source: a local directory, or a hub id fetched through the hub's cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from loftq_cli.checkpoint.not_a_model import refuse_marked, refuse_unmerged
from loftq_cli.checkpoint.quantized import refuse_quantized
from loftq_cli.checkpoint.source import Source, open_source
from loftq_cli.checkpoint.supply import Commit
from loftq_cli.errors import SourceNotFoundError


def locate(
    model: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    pinned: Commit | None = None,
    passing: Path | None = None,
    allow_pickle: bool = False,
    say: Callable[[str], None],
) -> Source:
    """The source that ``model`` names: a path where it exists or starts with ``.`` or ``/``, else
    a hub id. A hub's shards may not be there yet: ``supply`` brings them, into the hub cache or,
    to stay until they are released, into ``passing``. ``pinned`` is the commit to use whatever
    ``revision`` is by now. ``allow_pickle``: a directory may hold pickled weights alone.

    Raises InputError for a bad checkpoint, or one that is quantized already, or an adapter, or a
    conversion of ours; EnvironmentFailure for hub access.
    """
    if is_path(model):
        path = Path(os.path.expanduser(model))
        refuse_marked(path, model)
        return _in_full_precision(open_source(path, source_id=model, allow_pickle=allow_pickle))
    # Imported here: a local conversion needs no hub client.
    from loftq_cli.checkpoint import hub, hub_shards

    if not hub.looks_like_hub_id(model):
        raise SourceNotFoundError(f"{model}: no such directory, and not a hub id")
    snapshot = hub.fetch(model, revision, offline=offline, pinned=pinned, say=say)
    return _in_full_precision(
        open_source(
            snapshot.directory,
            source_id=snapshot.repo_id,
            revision=snapshot.revision,
            requested_revision=revision,
            resolved_from=snapshot.resolved_from,
            supply=hub_shards.HubSupply(snapshot, passing),
            left=snapshot.left_behind,
        )
    )


def _in_full_precision(source: Source) -> Source:
    """The source itself. Raises UnsupportedInputError where it is not what can be converted."""
    refuse_unmerged(source)
    refuse_quantized(source)
    return source


def is_path(model: str) -> bool:
    """Whether MODEL is a directory's path, and not a hub id."""
    return model.startswith((".", "/", "~")) or os.path.exists(model)
