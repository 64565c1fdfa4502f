"""What the tests of the commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from click.testing import Result

from loftq_cli.checkpoint.hub.listing import HubSnapshot, RemoteFile

QUICK = ("--rank", "4", "--iters", "2", "-t", "1")

Command = Callable[..., Result]
"""Runs ``loftq`` with these words."""


def snapshot_of(
    directory: Path, repo_id: str, revision: str, resolved_from: str | None = None
) -> HubSnapshot:
    """What fetching a model from the hub would give whose files lie in ``directory``."""
    shards = {
        path.name: RemoteFile(path.stat().st_size, None)
        for path in sorted(directory.glob("*.safetensors"))
    }
    return HubSnapshot(directory, repo_id, revision, resolved_from, shards)
