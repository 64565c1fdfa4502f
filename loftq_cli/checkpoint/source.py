"""A checkpoint directory: which shards, which tensors, checked from the headers alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from loftq_cli.checkpoint.companions import companions, left_behind, present
from loftq_cli.checkpoint.header import (
    Header,
    HeaderError,
    StoredTensor,
    is_text,
    shown,
)
from loftq_cli.checkpoint.lfs import refuse_pointers
from loftq_cli.checkpoint.names import is_plain_name
from loftq_cli.checkpoint.pipeline import refuse_parent
from loftq_cli.checkpoint.small_file import SmallFile, read_json
from loftq_cli.checkpoint.strays import refuse_links_to_nothing, strays
from loftq_cli.checkpoint.supply import PICKLED, Supply
from loftq_cli.errors import CorruptFileError, SourceNotFoundError, UnsupportedInputError
from loftq_cli.machine.durable import readable

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED_SINGLE = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
CONFIG = "config.json"
WEIGHTS = (SINGLE, INDEX, PICKLED_SINGLE, PICKLED_INDEX)
"""The files that lead to a model's weights."""
_MAX_NESTING = 50  # of config.json; the JSON writer recurses


@dataclass(frozen=True)
class Shard:
    """One safetensors file of the checkpoint."""

    name: str
    path: Path
    header: Header


@dataclass(frozen=True)
class Source:
    """A checked checkpoint. ``id`` is what the user typed, ``revision`` a hub commit or None,
    ``resolved_from`` the id that was asked for if a twin repository was used instead,
    ``requested_revision`` the branch, tag or commit that was asked for. A shard may be read once
    ``supply`` has ensured that it is there. ``left_behind``: what else belongs to the model, by
    name, and is neither read nor copied. ``encoded``: the formats of tensors that it holds in codes
    (see decoding)."""

    directory: Path
    id: str
    shards: tuple[Shard, ...]
    config: SmallFile
    index: SmallFile | None
    supply: Supply
    revision: str | None = None
    resolved_from: str | None = None
    requested_revision: str | None = None
    left_behind: tuple[str, ...] = ()
    encoded: tuple[str, ...] = ()

    @property
    def tensors(self) -> list[StoredTensor]:
        return [tensor for shard in self.shards for tensor in shard.header.tensors]

    @cached_property
    def stored(self) -> dict[str, tuple[Path, StoredTensor]]:
        """File and place of every tensor, by name."""
        return {t.name: (shard.path, t) for shard in self.shards for t in shard.header.tensors}


def file_hashes(source: Source) -> list[tuple[str, int, str]]:
    """(name, size, header sha256) of each shard; whole contents for the small JSON files."""
    identity = [(shard.name, shard.header.size, shard.header.sha256) for shard in source.shards]
    small = [source.config] + ([source.index] if source.index else [])
    return identity + [(file.name, file.size, file.sha256) for file in small]


def open_source(
    directory: Path,
    *,
    source_id: str | None = None,
    revision: str | None = None,
    resolved_from: str | None = None,
    requested_revision: str | None = None,
    supply: Supply | None = None,
    allow_pickle: bool = False,
    left: tuple[str, ...] | None = None,
) -> Source:
    """Read the headers of the checkpoint in ``directory`` and check them against each other.

    ``supply`` knows the shards if they are not all in ``directory`` yet. With ``allow_pickle``
    pickled weights are read if there are no others. ``left`` is what is left behind, if more
    belongs to the model than lies in ``directory``.

    Raises SourceNotFoundError if there is nothing to convert and CorruptFileError with every
    fault that the headers show, before anything is computed.
    """
    _check_directory(directory)
    supply = supply or Supply(directory)
    if not revision:
        refuse_links_to_nothing(directory, (CONFIG, SINGLE, INDEX))
    names, index = _shard_names(directory, supply, allow_pickle)
    copied = companions(directory)
    # Of the hub's cache, shards that lead nowhere are downloaded.
    refuse_links_to_nothing(directory, copied if revision else (*names, *copied))
    refuse_pointers(directory, (CONFIG, *names, *copied))
    config = _read_config(directory)
    read = [CONFIG, *([index.name] if index else []), *names]
    # The hub's cache is trusted: its blobs may themselves be links to a store that it shares.
    faults, hint = ([], None) if revision else strays(directory, read, copied)
    shards, broken = _read_shards(names, supply)
    faults += broken
    faults += _cross_check(shards, index, complete=len(shards) == len(names))
    _refuse(directory, faults, hint)
    return Source(
        directory,
        source_id or str(directory),
        tuple(shards),
        config,
        index,
        supply,
        revision,
        resolved_from,
        requested_revision,
        left_behind(present(directory), {*read, *copied}) if left is None else left,
    )


def _refuse(directory: Path, faults: Sequence[str], hint: str | None) -> None:
    if faults:
        count = f"{len(faults)} faults: " if len(faults) > 1 else ""
        raise CorruptFileError(f"{directory}: {count}" + "; ".join(faults), hint=hint)


def _check_directory(directory: Path) -> None:
    # os.path, because Path raises if a name is too long or a parent may not be searched
    if not os.path.exists(directory):
        raise SourceNotFoundError(f"{directory}: no such file or directory")
    if not os.path.isdir(directory):
        raise SourceNotFoundError(
            f"{directory} is a file, not a directory",
            hint="give the directory that holds config.json and model.safetensors",
        )


def _read_shards(names: Sequence[str], supply: Supply) -> tuple[list[Shard], list[str]]:
    """The shards whose headers can be read, and what is wrong with the others."""
    shards, faults = [], []
    for name in names:
        try:
            path = supply.path(name)
            with readable(path):
                shards.append(Shard(name, path, supply.header(name)))
        except FileNotFoundError:
            faults.append(f"{name}: missing, the index names it")
        except HeaderError as error:
            faults.append(f"{name}: {error}")
        except OSError as error:
            faults.append(f"{name}: cannot be read: {error.strerror or error}")
    return shards, faults


def _shard_names(
    directory: Path, supply: Supply, allow_pickle: bool
) -> tuple[list[str], SmallFile | None]:
    if supply.has(SINGLE):
        return [SINGLE], None
    listing = INDEX
    if not (directory / INDEX).exists() and allow_pickle:
        if supply.has(PICKLED_SINGLE):
            return [PICKLED_SINGLE], None
        listing = PICKLED_INDEX
    if not (directory / listing).exists():
        others = sorted(
            path.name
            for pattern in ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.gguf")
            for path in directory.glob(pattern)
        )
        refuse_links_to_nothing(directory, (*WEIGHTS, *others))
        refuse_pointers(directory, others)
        refuse_parent(directory)
        if others and all(name.endswith((".bin", ".pth", ".pt")) for name in others):
            raise UnsupportedInputError(
                f"{directory} holds only pickled weights ({', '.join(others[:3])})",
                hint="--allow-pickle reads them, and runs nothing that is in them; or save the "
                "model with safetensors first: save_pretrained(DIR)",
            )
        found = f" (found {', '.join(others[:3])})" if others else ""
        raise SourceNotFoundError(f"{directory} has no {SINGLE} and no {INDEX}{found}")
    index = read_json(directory / listing)
    weight_map = index.content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(f"{directory / listing}: no weight_map")
    suffix = ".safetensors" if listing == INDEX else PICKLED
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not is_plain_name(name):
            raise CorruptFileError(
                f"{directory / listing}: tensor {shown(tensor)} points to {shown(name)}, "
                "not a file beside it"
            )
        if name.endswith(PICKLED) != (suffix == PICKLED):
            raise CorruptFileError(
                f"{directory / listing}: tensor {shown(tensor)} points to {shown(name)}, "
                f"not a {suffix} file"
            )
    return sorted(set(weight_map.values())), index


def _cross_check(shards: list[Shard], index: SmallFile | None, *, complete: bool) -> list[str]:
    faults = []
    home: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.header.tensors:
            if tensor.name in home:
                faults.append(
                    f"tensor {shown(tensor.name)} is in {home[tensor.name]} "
                    f"and again in {shard.name}"
                )
            home[tensor.name] = shard.name
    if index is not None:
        present = {shard.name for shard in shards}
        for tensor_name, name in index.content["weight_map"].items():
            if name in present and home.get(tensor_name) != name:
                held = f", {home[tensor_name]} does" if tensor_name in home else ""
                faults.append(
                    f"the index puts tensor {shown(tensor_name)} in {name}, "
                    f"which does not hold it{held}"
                )
    if complete and not home:
        faults.append("no tensors at all")
    return faults


def _read_config(directory: Path) -> SmallFile:
    """config.json, which can be written again, and whose ``architectures``, which many read, are
    what they should be."""
    path = directory / CONFIG
    read = read_json(path)
    config = read.content
    if not _can_be_written(config, _MAX_NESTING):
        raise CorruptFileError(f"{path}: not valid Unicode, or nested too deeply")
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(is_text(name) for name in names)):
        raise CorruptFileError(f"{path}: architectures {shown(names)} is not a list of names")
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise CorruptFileError(f"{path}: model_type {shown(kind)} is not a name")
    return read


def _can_be_written(value: object, levels: int) -> bool:
    if isinstance(value, str):
        return is_text(value)
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return levels > 0 and all(_can_be_written(item, levels - 1) for item in value)
    return True
