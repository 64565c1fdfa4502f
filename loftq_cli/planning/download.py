"""What is still to be downloaded of a source, and the room that it takes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.checkpoint.source import Source
from loftq_cli.machine.resources import check_space


@dataclass(frozen=True)
class Download:
    """``nbytes`` in ``files`` shards go into ``directory``, where they take ``disk_bytes`` more
    than there is now, at most: all of it, or two at a time if they do not stay."""

    files: int
    nbytes: int
    disk_bytes: int
    directory: Path | None


def planned_download(source: Source) -> Download:
    """The shards of ``source`` that are not on disk."""
    missing = source.supply.missing
    places = (shard.path.parent for shard in source.shards if shard.name in missing)
    directory = next(places, None)
    return Download(
        files=len(missing),
        nbytes=sum(missing.values()),
        disk_bytes=source.supply.disk_bytes,
        directory=directory,
    )


def check_disks(source: Source, output: Path, needed: int) -> None:
    """Raise EnvironmentFailure if the disk of ``output`` lacks ``needed`` bytes, or that of the
    downloads lacks room for them."""
    download = planned_download(source)
    shared = 0
    if download.directory is not None:
        if _device(download.directory) == _device(output):
            shared = download.disk_bytes
        else:
            check_space(download.directory, download.disk_bytes, hint=_HINT)
    check_space(output, needed + shared, hint=_HINT if shared else None)


_HINT = (
    "free space, set HF_HOME or --output to a larger disk, or use --discard-shards, which needs "
    "room for two shards of the source at a time"
)


def _device(path: Path) -> int:
    while not os.path.exists(path):
        path = path.parent
    return os.stat(path).st_dev
