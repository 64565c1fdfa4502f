"""The files of a refined conversion: those of the conversion, with what is new in them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.companions import copy_files
from loftq_cli.checkpoint.header import StoredTensor, TensorSpec, read_header
from loftq_cli.checkpoint.output import MANIFEST, file_entries, relative
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.checkpoint.stored import Stored
from loftq_cli.checkpoint.writer import GrowingShard
from loftq_cli.exporting.plan import TRAINED
from loftq_cli.layouts.adapter import CONFIG, DIRECTORY, WEIGHTS
from loftq_cli.machine.durable import copy_file, explained, pretty_json, write_file
from loftq_cli.numerics.metrics import squared_norm
from loftq_cli.refinement.conversion import Conversion


def write_files(conversion: Conversion, refined: Stored, target: Path, final: Path) -> None:
    """Write everything but the manifest to ``target``, which will be ``final``: tensors that are
    ``refined`` are taken from there."""
    start, weights = conversion.start, f"{DIRECTORY}/{WEIGHTS}"
    with explained(target):
        (target / DIRECTORY).mkdir(parents=True, exist_ok=True)
    adapted = conversion.output.is_adapted
    for shard in [] if adapted else conversion.files.shards:
        _write(shard.path, shard.header.tensors, refined, target / shard.name)
    _write(start.file, read_header(start.file).tensors, refined, target / weights)
    shards = {shard.name: shard.path for shard in conversion.files.shards}
    for name, path in shards.items() if adapted else ():
        copy_file(path, target / name)
    written = {MANIFEST, weights, *shards}
    names = [entry["name"] for entry in conversion.output.manifest["outputs"]]
    kept = [name for name in names if name not in written and not name.startswith(f"{TRAINED}/")]
    copy_files({name: conversion.directory / name for name in kept}, target)
    if start.config.get("base_model_name_or_path") and not adapted:
        config = {**start.config, "base_model_name_or_path": str(final)}
        write_file(target / DIRECTORY / CONFIG, pretty_json(config))


def _write(file: Path, tensors: Sequence[StoredTensor], refined: Stored, target: Path) -> None:
    specs = [TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    with GrowingShard(target, specs) as shard:
        for tensor in tensors:
            path, stored = refined.get(tensor.name, (file, tensor))
            with TensorFile(path) as held:
                shard.write_pieces(tensor.name, held.pieces(stored))
        shard.sync()


def manifest_of(
    conversion: Conversion,
    refined: Stored,
    told: Mapping[str, Any],
    fingerprint: str,
    environment: Mapping[str, Any],
    target: Path,
) -> dict[str, Any]:
    """The manifest of the finished files in ``target``: the conversion's, with residuals of what
    there is now; ``told``: what it says of the refinement."""
    manifest = copy.deepcopy(conversion.output.manifest)
    for record in manifest["matrices"]:
        name = record["name"]
        held = conversion.held[name]
        if held.specs[0].name not in refined:
            continue
        now = held.decoded(held.read(conversion.directory, refined))
        error = conversion.weight(name) - now
        record["step"] = 0
        record["frobenius"] |= {"steps": [], "final": squared_norm(error) ** 0.5}
        record.pop("weighted", None)  # of what there was
    records = manifest["matrices"]
    manifest["totals"]["relative_residual"] = relative(records, "final")
    manifest.pop("exported", None)
    manifest["refined"] = {"fingerprint": conversion.output.origin, **told}
    manifest["environment"] = dict(environment)
    manifest["fingerprint"] = fingerprint
    manifest["outputs"] = file_entries(target)
    return manifest
