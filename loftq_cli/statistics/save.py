"""Files of activation statistics: which model they are of, and writing them from Python."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from loftq_cli.checkpoint.companions import companions, is_input
from loftq_cli.checkpoint.source import Source, open_source
from loftq_cli.errors import StatisticsError, UsageError
from loftq_cli.machine.durable import explained, file_sha256
from loftq_cli.numerics.moments import Moments
from loftq_cli.statistics.file import compact_json, model_sha256
from loftq_cli.statistics.statistics import MeasuredModel
from loftq_cli.statistics.writer import StatisticsWriter


def measured_model(source: Source) -> MeasuredModel:
    return MeasuredModel(source.id, model_sha256(source))


def contents_sha256(source: Source) -> str | None:
    """sha256 of what measuring reads, weights, configuration and tokenizer: of the compact JSON of
    the sorted [name, sha256] of these files. None if a shard is not there, and the hub does not
    say what is in it. Raises EnvironmentFailure."""
    small = [source.directory / name for name in companions(source.directory) if is_input(name)]
    files = []
    for shard in source.shards:
        digest = source.supply.sha256(shard.name)
        if digest is None:
            if not shard.path.exists():
                return None
            small.append(shard.path)
        else:
            files.append((shard.name, digest))
    for path in small:
        with explained(path):
            files.append((path.name, file_sha256(path)))
    return hashlib.sha256(compact_json(sorted(files)).encode()).hexdigest()


def save_statistics(
    path: str | os.PathLike[str],
    moments: Mapping[str, Moments],
    *,
    model: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write moments that were measured outside of ``loftq calibrate``; see
    ``loftq_cli.save_statistics``."""
    if not moments:
        raise UsageError("no moments to save", hint="")
    source = None if model is None else open_source(Path(model), source_id=str(model))
    shapes = {tensor.name: tensor.shape for tensor in source.tensors} if source else {}
    shared: dict[int, list[str]] = {}
    for name, measured in moments.items():
        if not name.endswith(".weight"):
            raise UsageError(
                f"{name!r} is not the name of a weight tensor",
                hint="take the names in the checkpoint, such as model.layers.0.mlp.up_proj.weight",
            )
        if source is not None and shapes.get(name, (0, 0))[1:] != (measured.in_features,):
            shape = shapes.get(name)
            what = f"has shape {list(shape)}" if shape else "does not exist"
            raise UsageError(
                f"{name!r} {what} in {source.directory}, {measured.in_features} inputs were "
                "measured",
                hint="take the names of this checkpoint",
            )
        shared.setdefault(id(measured), []).append(name)
    identity = measured_model(source) if source else None
    with StatisticsWriter(Path(path), moments, model=identity, overwrite=overwrite) as writer:
        for names in shared.values():
            write_entry(writer, names, moments[names[0]])
        writer.publish()


def write_entry(writer: StatisticsWriter, names: list[str], moments: Moments) -> None:
    """Add an entry. Raises StatisticsError if the inputs were never anything but zero, and
    UsageError if there were none."""
    if not moments.tokens:
        raise UsageError(f"{names[0]}: no inputs were measured", hint="")
    value = moments.value()
    if not bool(value.any()):
        raise StatisticsError(
            f"{names[0]}: the inputs are zero throughout",
            hint="exclude the layer, or use more text",
        )
    writer.add(names, value, moments.tokens)
