"""MODEL to a checked source: a local directory, or a hub id fetched through the hub's cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from loftq_cli.checkpoint.source import Source, open_source
from loftq_cli.errors import SourceNotFoundError


def locate(
    model: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    say: Callable[[str], None],
) -> Source:
    """The source that ``model`` names: a path where it exists or starts with ``.`` or ``/``, else
    a hub id. Raises InputError for a bad checkpoint, EnvironmentFailure for hub access."""
    if model.startswith((".", "/", "~")) or os.path.exists(model):
        return open_source(Path(os.path.expanduser(model)), source_id=model)
    # Imported here: a local conversion needs no hub client.
    from loftq_cli.checkpoint import hub

    if not hub.looks_like_hub_id(model):
        raise SourceNotFoundError(f"{model}: no such directory, and not a hub id")
    snapshot = hub.fetch(model, revision, offline=offline, say=say)
    return open_source(
        snapshot.directory,
        source_id=snapshot.repo_id,
        revision=snapshot.revision,
        resolved_from=snapshot.resolved_from,
    )
