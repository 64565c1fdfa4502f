"""Whether a source shard still holds what an unfinished conversion read of it."""

from __future__ import annotations

from collections.abc import Mapping

from loftq_cli.checkpoint.journal import ReadShard, Unit
from loftq_cli.checkpoint.reader import ShardReader
from loftq_cli.checkpoint.source import Shard
from loftq_cli.errors import SourceChangedError


def check_prefix(reader: ShardReader, unit: Unit) -> None:
    """Raise SourceChangedError if what was read up to the end of a finished tensor, which is
    where ``reader`` is, is not what it was when the tensor was finished."""
    if reader.sha256 != unit.prefix_sha256:
        what = f"the contents up to tensor {unit.tensor!r}"
        raise _changed(reader, what, unit.prefix_sha256)


def check_contents(
    shard: Shard, finished: Mapping[str, Unit], known: ReadShard | None
) -> ReadShard:
    """Read ``shard`` and compare it with what is ``known`` of it and of the tensors ``finished``.

    Raises SourceChangedError; before anything of it is converted anew, so that nothing from the
    changed file gets among what was finished.
    """
    with ShardReader(shard) as reader:
        for tensor in shard.header.tensors:
            reader.pass_over(tensor)
            if tensor.name in finished:
                check_prefix(reader, finished[tensor.name])
        reader.finish()
        reader.check_unchanged()
        if known is not None and known.sha256 != reader.sha256:
            raise _changed(reader, "the contents", known.sha256)
        return ReadShard(shard.name, reader.sha256, reader.mtime_ns)


def _changed(reader: ShardReader, what: str, before: str) -> SourceChangedError:
    return SourceChangedError(
        f"{reader.path}: {what} are not those that the unfinished conversion read: sha256 "
        f"{before[:16]}… there, {reader.sha256[:16]}… now"
    )
