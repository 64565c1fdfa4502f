"""``loftq import-adapter``: an adapter that mlx-lm trained, as PEFT stores one.

What ``loftq export --layout mlx`` did to the pairs, the other way round: A and B are transposed,
and the modules have the names that they have in transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.dtypes import FLOATS
from loftq_cli.checkpoint.header import StoredTensor, TensorSpec, shown
from loftq_cli.checkpoint.output import Output, open_output
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.checkpoint.small_file import read_json
from loftq_cli.checkpoint.source import CONFIG as SOURCE_CONFIG
from loftq_cli.checkpoint.source import open_source
from loftq_cli.checkpoint.writer import GrowingShard
from loftq_cli.errors import (
    CorruptFileError,
    InputError,
    SourceNotFoundError,
    UnsupportedInputError,
)
from loftq_cli.exporting.mlx.adapter import CONFIG, WEIGHTS
from loftq_cli.families.tasks import task_type
from loftq_cli.layouts import adapter as adapters
from loftq_cli.layouts.trained import tensors_in
from loftq_cli.machine.durable import explained, pretty_json, write_file
from loftq_cli.machine.observer import Observer
from loftq_cli.machine.paths import check_output_path
from loftq_cli.machine.workspace import Workspace
from loftq_cli.merging.backbone import open_backbone
from loftq_cli.merging.names import recorded

_TENSOR = re.compile(r"(.+)\.(lora_[ab]|m)")


class ImportWorkspace(Workspace):
    """The life of the adapter that is written."""

    suffix = "loftq-import"
    marker = adapters.CONFIG
    kind = "an adapter"
    doing = "writing"


@dataclass(frozen=True)
class Trained:
    """``pairs``: lora_a (in, rank) and lora_b (rank, out) by module, in ``file``; ``scale``: what
    their product is multiplied with."""

    file: Path
    pairs: Mapping[str, tuple[StoredTensor, StoredTensor]]
    scale: float
    rank: int


def import_adapter(
    directory: Path,
    output: Path,
    *,
    adapter: Path,
    overwrite: bool = False,
    observer: Observer,
) -> dict[str, Any]:
    """Write the adapter that mlx-lm saved in ``adapter``, trained on the conversion in
    ``directory``, to ``output`` as PEFT's ``save_pretrained`` would.

    Returns what ``--json`` prints. Raises InputError and its kin for an adapter of another kind or
    of something else, UsageError, OutputConflictError, EnvironmentFailure.
    """
    found = open_output(directory)
    final = check_output_path(output, adapter)
    trained = _opened(adapter)
    homes = _homes(found, trained)
    workspace = ImportWorkspace(final)
    workspace.check_permissions()
    with workspace.locked():
        workspace.refuse_other_output(overwrite)
        workspace.discard_work()
        with explained(workspace.output):
            workspace.output.mkdir()
        _write(found, trained, homes, workspace.output, observer)
        workspace.publish(overwrite)
    return {
        "adapter": str(adapter),
        "directory": str(directory),
        "matrices": len(homes),
        "output": str(output),
        "rank": trained.rank,
        "scale": trained.scale,
    }


def _opened(path: Path) -> Trained:
    """The adapter in ``path``, a directory or its weights file."""
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise SourceNotFoundError(
            f"{file}: no such file", hint=f"give the --adapter-path of mlx_lm.lora, with {WEIGHTS}"
        )
    settings_file = file.parent / CONFIG
    if not settings_file.is_file():
        raise SourceNotFoundError(
            f"{settings_file}: missing", hint="it says how the adapter's tensors are to be scaled"
        )
    scale, rank = _settings(settings_file, read_json(settings_file).content)
    sides: dict[str, dict[str, StoredTensor]] = {}
    for tensor in tensors_in(file):
        match = _TENSOR.fullmatch(tensor.name)
        if match is None or tensor.dtype not in FLOATS:
            raise InputError(
                f"{file}: tensor {tensor.name!r} is no part of a pair",
                hint="give an adapter of `mlx_lm.lora --fine-tune-type lora`",
            )
        if match[2] == "m" or len(tensor.shape) != 2:
            kind = "DoRA" if match[2] == "m" else "of the experts of a layer"
            raise UnsupportedInputError(f"{file}: tensor {tensor.name!r} is {kind}")
        sides.setdefault(match[1], {})[match[2]] = tensor
    if not sides:
        raise InputError(f"{file}: no LoRA tensors in it")
    return Trained(
        file, {name: _pair(file, name, each, rank) for name, each in sides.items()}, scale, rank
    )


def _settings(file: Path, config: Mapping[str, Any]) -> tuple[float, int]:
    """Scale and rank."""
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise UnsupportedInputError(
            f"{file}: fine_tune_type is {shown(kind)}, and only lora can be taken over"
        )
    lora = config.get("lora_parameters")
    held = lora if isinstance(lora, dict) else {}
    scale, rank = held.get("scale"), held.get("rank")
    if not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise CorruptFileError(f"{file}: lora_parameters has scale {shown(scale)}")
    if not isinstance(rank, int) or rank < 1:
        raise CorruptFileError(f"{file}: lora_parameters has rank {shown(rank)}")
    return float(scale), rank


def _pair(
    file: Path, module: str, sides: Mapping[str, StoredTensor], rank: int
) -> tuple[StoredTensor, StoredTensor]:
    for side in ("lora_a", "lora_b"):
        if side not in sides:
            raise CorruptFileError(f"{file}: tensor '{module}.{side}' missing")
    first, second = sides["lora_a"], sides["lora_b"]
    if (first.shape[1], second.shape[0]) != (rank, rank):
        raise CorruptFileError(
            f"{file}: tensor {first.name!r} is {list(first.shape)} and {second.name!r} "
            f"{list(second.shape)}, and {CONFIG} says rank {rank}",
            hint="give the adapter with the config that it was saved with",
        )
    return first, second


@dataclass(frozen=True)
class _Home:
    """Where a pair goes: the ``module`` in memory, and whether that is an embedding."""

    module: str
    embedding: bool


def _homes(found: Output, trained: Trained) -> dict[str, _Home]:
    """Of every pair. Raises InputError if the conversion has no place for one."""
    backbone = open_backbone(found, open_source(found.directory))
    in_memory = recorded(found)
    homes = {}
    for module, (first, second) in trained.pairs.items():
        name = f"{module}.weight"
        shape, embedding = backbone.shapes.get(name), backbone.kinds.get(name) == "embedding"
        sides = (first.shape[0], second.shape[1])
        wanted = sides if embedding else sides[::-1]
        if shape != wanted:
            held = "has no such tensor" if shape is None else f"has {list(shape)}"
            raise InputError(
                f"{trained.file}: tensor {first.name!r} is for a {name!r} of {list(wanted)}; "
                f"{found.directory} {held}",
                hint="give the conversion whose export was trained",
            )
        homes[module] = _Home(in_memory.get(name, name).removesuffix(".weight"), embedding)
    return homes


def _write(
    found: Output,
    trained: Trained,
    homes: Mapping[str, _Home],
    target: Path,
    observer: Observer,
) -> None:
    specs = {module: _specs(trained.pairs[module], home) for module, home in homes.items()}
    every = [spec for pair in specs.values() for spec in pair]
    observer.begin(sum(spec.nbytes for spec in every), "importing")
    try:
        with (
            TensorFile(trained.file) as file,
            GrowingShard(target / adapters.WEIGHTS, every) as shard,
        ):
            for module, pair in trained.pairs.items():
                observer.working_on(module)
                for spec, tensor in zip(specs[module], pair, strict=True):
                    shard.write(spec.name, file.read(tensor).T.contiguous())
                    observer.advance(spec.nbytes)
            shard.sync()
    finally:
        observer.end()
    names = read_json(found.directory / SOURCE_CONFIG).content.get("architectures") or [""]
    alpha = trained.scale * trained.rank
    config = adapters.config(
        {home.module: trained.rank for home in homes.values()},
        trained.rank,
        alpha,
        task_type([str(names[0])]),
        architecture=str(names[0]) or None,
        base_model=str(found.directory.resolve()),
    )
    write_file(target / adapters.CONFIG, pretty_json(config))


def _specs(pair: tuple[StoredTensor, StoredTensor], home: _Home) -> tuple[TensorSpec, TensorSpec]:
    """Of A and B."""
    pattern = "lora_embedding_{}" if home.embedding else "lora_{}.weight"
    first, second = (
        TensorSpec(
            f"{adapters.PREFIX}{home.module}.{pattern.format(side)}",
            tensor.dtype,
            tensor.shape[::-1],
        )
        for side, tensor in zip("AB", pair, strict=True)
    )
    return first, second
