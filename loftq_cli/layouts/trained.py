"""A LoRA adapter as PEFT's ``save_pretrained`` leaves it after training: read, checked, sorted.

Names are those of the model that was trained. Beside the pairs A, B it may hold whole tensors:
biases, modules trained in full (``modules_to_save``), embeddings that were resized; and rows of
embeddings (``trainable_token_indices``). What cannot be merged into a weight, or changes what the
pairs mean, is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.dtypes import FLOATS
from loftq_cli.checkpoint.header import HeaderError, StoredTensor, read_header
from loftq_cli.checkpoint.small_file import read_json
from loftq_cli.errors import (
    CorruptFileError,
    EnvironmentFailure,
    InputError,
    SourceNotFoundError,
    UnsupportedInputError,
)
from loftq_cli.families.experts import is_expert, is_part, part_of
from loftq_cli.layouts.adapter import CONFIG, OF_MLX_LM, PREFIX, WEIGHTS
from loftq_cli.layouts.trained_config import check_config, token_indices
from loftq_cli.layouts.trained_parts import FusedPair, Pair, Recent, TokenRows

SAVE_BOTH = (
    "save the adapter again with save_pretrained(DIR, save_embedding_layers=True), or train with "
    "both embeddings in modules_to_save"
)
"""What to do if an embedding that was resized is not in an adapter."""

_PAIR = re.compile(r"(.+)\.lora_([AB])\.weight")
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.weight)?")
_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")
_BASE = re.compile(r"(?:\.token_adapter)?\.base_layer\.")
WRAPPERS = (".modules_to_save.", ".original_module.")
"""What PEFT puts around a module that is trained in full, as it is in the names of tensors."""


@dataclass(frozen=True)
class TrainedAdapter:
    """``pairs`` by module, ``tokens`` by module, ``whole`` tensors by name, ``frozen`` ones, which
    are what the backbone had under a pair, by name: all as the trained model names them. ``fused``:
    those of a layer's experts, by their module and parameter."""

    file: Path
    config: Mapping[str, Any]
    pairs: Mapping[str, Pair]
    whole: Mapping[str, StoredTensor]
    frozen: Mapping[str, StoredTensor]
    tokens: Mapping[str, TokenRows]
    fused: Mapping[str, Mapping[str, FusedPair]] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """Where the adapter lies, with what training saved beside it."""
        return self.file.parent

    def targets(self, module: str) -> bool:
        """Whether the config says that ``module`` has a pair; False if that is not decided by
        names alone."""
        if self.config.get("layers_to_transform") is not None:
            return False
        excluded = _matches(self.config.get("exclude_modules"), module)
        return _matches(self.config.get("target_modules"), module) and not excluded

    def targets_expert(self, module: str) -> str | None:
        """The fused parameter with a pair for an expert's ``module``, None if the config names
        none."""
        experts = (part_of(module) or ("",))[0]
        for name in self.config.get("target_parameters") or ():
            home, _, parameter = str(name).rpartition(".")
            is_home = not home or f".{experts}".endswith(f".{home}")
            if is_home and is_part(module, parameter):
                return f"{experts}.{parameter}"
        return None

    def saves(self, name: str) -> bool:
        """Whether the tensor ``name`` belongs to a module that ``modules_to_save`` lists."""
        saved = self.config.get("modules_to_save")
        parts = name.split(".")
        paths = [".".join(parts[:count]) for count in range(1, len(parts))]
        return isinstance(saved, list) and any(
            isinstance(entry, str) and path.endswith(entry) for entry in saved for path in paths
        )


def open_adapter(path: Path) -> TrainedAdapter:
    """The adapter in ``path``, a directory or its weights file.

    Raises SourceNotFoundError if there is none, CorruptFileError if it disagrees with itself,
    UnsupportedInputError for kinds of adapters that cannot be merged.
    """
    file = _weights(path)
    config_file = file.parent / CONFIG
    if not config_file.is_file():
        raise SourceNotFoundError(
            f"{config_file}: missing", hint="it says how the adapter's tensors are to be scaled"
        )
    config = read_json(config_file).content
    check_config(config_file, config)
    found = _sorted(file, tensors_in(file))
    fused = _fused(file, config, found.pairs)
    if config.get("trainable_token_indices") and not found.tokens:
        raise CorruptFileError(
            f"{file}: {CONFIG} lists trainable_token_indices, and the file holds no such tokens",
            hint="give the adapter with the config that it was saved with",
        )
    return TrainedAdapter(
        file,
        config,
        {module: _pair(file, config, module, sides) for module, sides in found.pairs.items()},
        found.whole,
        found.frozen,
        {module: _rows(file, config, module, rows) for module, rows in found.tokens.items()},
        fused,
    )


def tensors_in(file: Path) -> tuple[StoredTensor, ...]:
    """What the adapter ``file`` holds. Raises CorruptFileError, or EnvironmentFailure if it cannot
    be read."""
    try:
        return read_header(file).tensors
    except HeaderError as error:
        raise CorruptFileError(f"{file}: {error}") from error
    except OSError as error:
        raise EnvironmentFailure(f"{file}: {error.strerror or error}") from error


def _weights(path: Path) -> Path:
    if path.is_dir():
        file = path / WEIGHTS
        refuse_other_forms(path)
    else:
        file = path
    if not file.is_file():
        raise SourceNotFoundError(
            f"{file}: no such file",
            hint=f"give the directory that holds {CONFIG} and {WEIGHTS}",
        )
    return file


def refuse_other_forms(directory: Path) -> None:
    """Raise UnsupportedInputError if the adapter in ``directory`` is a pickle, or mlx-lm's."""
    if (directory / WEIGHTS).exists():
        return
    if (directory / "adapter_model.bin").exists():
        raise UnsupportedInputError(
            f"{directory} holds only pickled weights (adapter_model.bin)",
            hint="save the adapter with safetensors first: save_pretrained(DIR)",
        )
    if (directory / OF_MLX_LM).exists():
        raise UnsupportedInputError(
            f"{directory} was saved by mlx-lm ({OF_MLX_LM})",
            hint=f"loftq import-adapter OUT -o trained --adapter {directory}, and take that",
        )


@dataclass(frozen=True)
class _Found:
    """The tensors of a file: module -> "A" and "B"; by name; by name; module -> rows."""

    pairs: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    whole: dict[str, StoredTensor] = field(default_factory=dict)
    frozen: dict[str, StoredTensor] = field(default_factory=dict)
    tokens: dict[str, StoredTensor] = field(default_factory=dict)


def _sorted(file: Path, tensors: Sequence[StoredTensor]) -> _Found:
    result = _Found()
    for tensor in tensors:
        name = tensor.name.removeprefix(PREFIX)
        if name == tensor.name:
            raise InputError(
                f"{file}: tensor {tensor.name!r}: the name does not begin with {PREFIX}",
                hint="give an adapter that PEFT's save_pretrained wrote",
            )
        if found := _PAIR.fullmatch(name) or _EMBEDDING.fullmatch(name):
            result.pairs.setdefault(found.group(1), {})[found.group(2)] = tensor
            continue
        if found := _TOKENS.fullmatch(name):
            result.tokens[found.group(1)] = tensor
            continue
        if _MAGNITUDE.fullmatch(name):
            raise UnsupportedInputError(
                f"{file}: tensor {tensor.name!r}: DoRA, which cannot be merged",
                hint="merge it with PEFT's merge_and_unload, if PEFT can",
            )
        # PEFT saves the weight of an embedding along with its pair, trained or not.
        kind = result.frozen if _BASE.search(name) and not name.endswith(".bias") else result.whole
        plain = _BASE.sub(".", name)
        if plain in kind:
            raise CorruptFileError(f"{file}: tensor {tensor.name!r}: {plain!r} is there twice")
        kind[plain] = tensor
    for name in [name for name in result.whole if _is_wrapped(name, result.whole)]:
        del result.whole[name]
    if not result.pairs:
        raise InputError(f"{file}: no LoRA tensors in it")
    return result


def _is_wrapped(name: str, whole: Collection[str]) -> bool:
    """Whether this is of PEFT's wrapper of a module in ``modules_to_save``. Under ``bias: all``,
    and of embeddings that were resized, PEFT saves that too: what was trained again, and what was
    there before training."""
    for wrapper in WRAPPERS:
        module, found, rest = name.partition(wrapper)
        if found:
            bare = rest.partition(".")[2]  # without the adapter's name
            return f"{module}.{rest}" in whole or f"{module}.{bare}" in whole
    return False


def _rows(file: Path, config: Mapping[str, Any], module: str, values: StoredTensor) -> TokenRows:
    indices = token_indices(config, module)
    if indices is None or len(values.shape) != 2 or values.shape[0] != len(indices):
        raise CorruptFileError(
            f"{file}: tensor {values.name!r} is {list(values.shape)}, which are not the tokens of "
            f"trainable_token_indices in {CONFIG}",
            hint="give the adapter with the config that it was saved with",
        )
    if values.dtype not in FLOATS:
        raise UnsupportedInputError(f"{file}: tensor {values.name!r} is {values.dtype}")
    return TokenRows(indices, values)


def _fused(
    file: Path, config: Mapping[str, Any], pairs: dict[str, dict[str, StoredTensor]]
) -> dict[str, dict[str, FusedPair]]:
    """Those of ``pairs``, taken out of them, that are of the experts of a layer: by the experts'
    module, and the parameter that it adapts."""
    if not config.get("target_parameters"):
        return {}
    found: dict[str, dict[str, FusedPair]] = {}
    recent = Recent(file)
    for module in [name for name in pairs if is_expert(f"{name}.")]:
        # The wrapper of the second parameter lies around that of the first.
        experts = module.removesuffix(".base_layer")
        leaves = {str(name).rpartition(".")[2] for name in config["target_parameters"]}
        first = "up_proj" if "up_proj" in leaves else "gate_up_proj"
        parameter = "down_proj" if experts == module else first
        sides = pairs.pop(module)
        rank = _by_pattern(config, "rank_pattern", "r", f"{experts}.{parameter}")
        alpha = _by_pattern(config, "alpha_pattern", "lora_alpha", f"{experts}.{parameter}")
        lora_A, lora_B = (_side(file, module, sides, side) for side in "AB")
        counts = lora_A.shape[0], lora_B.shape[1]
        if rank < 1 or counts[0] != counts[1] or counts[0] % rank:
            raise CorruptFileError(
                f"{file}: tensor {lora_A.name!r} is {list(lora_A.shape)}, {lora_B.name!r} "
                f"{list(lora_B.shape)}, and {CONFIG} says rank {rank} for each expert",
                hint="give the adapter with the config that it was saved with",
            )
        root = math.sqrt(rank) if config.get("use_rslora") else rank
        pair = FusedPair(lora_A, lora_B, alpha / root, rank, recent)
        found.setdefault(experts, {})[parameter] = pair
    return found


def _side(file: Path, module: str, sides: Mapping[str, StoredTensor], side: str) -> StoredTensor:
    """A or B of ``module``, checked. Raises CorruptFileError, UnsupportedInputError."""
    embedding = any(_EMBEDDING.fullmatch(tensor.name) for tensor in sides.values())
    if side not in sides:
        name = f"lora_embedding_{side}" if embedding else f"lora_{side}.weight"
        raise CorruptFileError(f"{file}: tensor '{PREFIX}{module}.{name}' missing")
    tensor = sides[side]
    if len(tensor.shape) != 2 or tensor.dtype not in FLOATS:
        raise UnsupportedInputError(
            f"{file}: tensor {tensor.name!r} is {tensor.dtype} {list(tensor.shape)}, "
            "not a floating-point matrix"
        )
    return tensor


def _pair(
    file: Path, config: Mapping[str, Any], module: str, sides: Mapping[str, StoredTensor]
) -> Pair:
    embedding = any(_EMBEDDING.fullmatch(tensor.name) for tensor in sides.values())
    lora_A, lora_B = (_side(file, module, sides, side) for side in "AB")
    rank = _by_pattern(config, "rank_pattern", "r", module)
    alpha = _by_pattern(config, "alpha_pattern", "lora_alpha", module)
    for tensor, found in ((lora_A, lora_A.shape[0]), (lora_B, lora_B.shape[1])):
        if found != rank or rank < 1:
            raise CorruptFileError(
                f"{file}: tensor {tensor.name!r} is of rank {found}, {CONFIG} says {rank}",
                hint="give the adapter with the config that it was saved with",
            )
    root = math.sqrt(rank) if config.get("use_rslora") else rank
    return Pair(lora_A, lora_B, alpha / root, embedding)


def _by_pattern(config: Mapping[str, Any], patterns: str, default: str, module: str) -> Any:
    """The first entry of ``patterns`` that matches ``module``, as PEFT matches, or the default."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return config[default]


def _matches(wanted: object, module: str) -> bool:
    """Whether PEFT's ``target_modules`` (a pattern, or a list of names or ends of names) names
    ``module``."""
    if isinstance(wanted, str):
        return wanted == "all-linear" or re.fullmatch(wanted, module) is not None
    return isinstance(wanted, list) and any(
        module == entry or module.endswith(f".{entry}") for entry in wanted
    )
