"""Whether a source shard still holds what an unfinished conversion read of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

import torch

from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.checkpoint.journal import ReadShard, Unit
from loftq_cli.checkpoint.reader import ShardReader, pieces_of
from loftq_cli.checkpoint.source import Shard
from loftq_cli.errors import SourceChangedError


def is_as_old(shard: Shard, unit: Unit) -> bool:
    """Whether ``unit`` can be held against ``shard``: by contents, or, if it was read apart from
    the rest and its values were not hashed, because the shard is as old as it was then."""
    if unit.apart is None or unit.apart.sha256 is not None:
        return True
    try:
        return os.stat(shard.path).st_mtime_ns == unit.apart.mtime_ns
    except OSError:
        return False


def pass_over(reader: ShardReader, tensor: StoredTensor, unit: Unit) -> None:
    """Go on to the end of a finished ``tensor``. Raises SourceChangedError if what was read up to
    there, or the tensor itself if it was read apart, is not what it was when it was finished."""
    own = None if unit.apart is None else unit.apart.sha256
    if own is not None and own != (found := sha256_of(reader.read(tensor))):
        raise _changed(reader, f"the values of tensor {tensor.name!r}", own, found)
    reader.pass_over(tensor)
    if unit.prefix_sha256 not in (None, reader.sha256):
        what = f"the contents up to tensor {unit.tensor!r}"
        raise _changed(reader, what, unit.prefix_sha256, reader.sha256)


def sha256_of(tensor: torch.Tensor) -> str:
    """sha256 of the bytes of ``tensor`` as they are stored."""
    digest = hashlib.sha256()
    for piece in pieces_of(tensor):
        digest.update(piece)
    return digest.hexdigest()


def check_contents(
    shard: Shard, finished: Mapping[str, Unit], known: ReadShard | None
) -> ReadShard:
    """Read ``shard`` and compare it with what is ``known`` of it and of the tensors ``finished``.

    Raises SourceChangedError; before anything of it is converted anew, so that nothing from the
    changed file gets among what was finished.
    """
    with ShardReader(shard) as reader:
        for tensor in shard.header.tensors:
            if tensor.name in finished:
                pass_over(reader, tensor, finished[tensor.name])
            else:
                reader.pass_over(tensor)
        reader.finish()
        reader.check_unchanged()
        if known is not None and known.sha256 != reader.sha256:
            raise _changed(reader, "the contents", known.sha256, reader.sha256)
        return ReadShard(shard.name, reader.sha256, reader.mtime_ns)


def _changed(reader: ShardReader, what: str, before: str | None, now: str) -> SourceChangedError:
    assert before is not None
    return SourceChangedError(
        f"{reader.path}: {what} are not those that the unfinished conversion read: sha256 "
        f"{before[:16]}… there, {now[:16]}… now"
    )
