"""Which commit unfinished work reads: a branch that moves on meanwhile does not change it."""

from __future__ import annotations

import os

from loftq_cli.checkpoint.header import strict_json
from loftq_cli.checkpoint.source import Source
from loftq_cli.checkpoint.supply import Commit
from loftq_cli.conversion.workspace import ConversionWorkspace
from loftq_cli.machine.durable import explained, pretty_json, write_file


def pin(workspace: ConversionWorkspace, source: Source) -> None:
    """Record the commit that the work in ``workspace`` reads, if it is from a hub."""
    if source.revision is None:
        return
    record = {
        "model": source.resolved_from or source.id,
        "requested": source.requested_revision,
        "repository": source.id,
        "commit": source.revision,
    }
    write_file(workspace.pin, pretty_json(record))


def pinned(workspace: ConversionWorkspace, model: str, revision: str | None) -> Commit | None:
    """The commit that unfinished work on ``model`` at ``revision`` reads; None if there is no
    such work."""
    path = workspace.pin
    if not (os.path.exists(workspace.journal) and os.path.exists(path)):
        return None
    try:
        with explained(path):
            record = strict_json(path.read_bytes())
        if (record["model"], record["requested"]) != (model, revision):
            return None
        return Commit(str(record["repository"]), str(record["commit"]))
    except (ValueError, LookupError, TypeError):
        return None
