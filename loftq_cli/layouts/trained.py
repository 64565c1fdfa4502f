"""A LoRA adapter as PEFT's ``save_pretrained`` leaves it after training: read, checked, sorted.

Names are those of the model that was trained. Beside the pairs A, B it may hold whole tensors:
biases, and modules trained in full (``modules_to_save``). What cannot be merged into a weight, or
changes what the pairs mean, is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.dtypes import FLOATS
from loftq_cli.checkpoint.header import HeaderError, StoredTensor, read_header, shown
from loftq_cli.checkpoint.source import read_json
from loftq_cli.errors import (
    CorruptFileError,
    EnvironmentFailure,
    InputError,
    SourceNotFoundError,
    UnsupportedInputError,
)
from loftq_cli.layouts.adapter import CONFIG, PREFIX, WEIGHTS

_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
"""Settings under which a layer computes something else than (W + scaling * B A) x."""

_HARMLESS_INITS = ("eva", "gaussian", "orthogonal")
"""Initialisations by name that leave the backbone as it is; PEFT's others change its weights."""

_PAIR = re.compile(r"(.+)\.lora_([AB])\.weight")
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.weight)?")
_BASE = ".base_layer."
_WRAPPERS = (".modules_to_save.", ".original_module.")


@dataclass(frozen=True)
class Pair:
    """A (rank, in) and B (out, rank) in the adapter's file, and the factor of their product; of an
    ``embedding`` (num, dim), which gets (B A)^T, A (rank, num) and B (dim, rank)."""

    lora_A: StoredTensor
    lora_B: StoredTensor
    scaling: float
    embedding: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of what is added, (out, in) or (num, dim)."""
        rows, columns = self.lora_B.shape[0], self.lora_A.shape[1]
        return (columns, rows) if self.embedding else (rows, columns)


@dataclass(frozen=True)
class TrainedAdapter:
    """``pairs`` by module, ``whole`` tensors by name, ``frozen`` ones, which are copies of the
    backbone's, by name: all as the trained model names them."""

    file: Path
    config: Mapping[str, Any]
    pairs: Mapping[str, Pair]
    whole: Mapping[str, StoredTensor]
    frozen: Mapping[str, StoredTensor]

    def targets(self, module: str) -> bool:
        """Whether the config says that ``module`` has a pair; False where that is not decided by
        names alone."""
        if self.config.get("layers_to_transform") is not None:
            return False
        excluded = _matches(self.config.get("exclude_modules"), module)
        return _matches(self.config.get("target_modules"), module) and not excluded

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

    Raises SourceNotFoundError where there is none, CorruptFileError where it disagrees with itself,
    UnsupportedInputError for kinds of adapters that cannot be merged.
    """
    file = _weights(path)
    config_file = file.parent / CONFIG
    if not config_file.is_file():
        raise SourceNotFoundError(
            f"{config_file}: missing", hint="it says how the adapter's tensors are to be scaled"
        )
    config = read_json(config_file).content
    _check_config(config_file, config)
    try:
        tensors = read_header(file).tensors
    except HeaderError as error:
        raise CorruptFileError(f"{file}: {error}") from error
    except OSError as error:
        raise EnvironmentFailure(f"{file}: {error.strerror or error}") from error
    pairs, whole, frozen = _sorted(file, tensors)
    checked = {module: _pair(file, config, module, sides) for module, sides in pairs.items()}
    return TrainedAdapter(file, config, checked, whole, frozen)


def _weights(path: Path) -> Path:
    if path.is_dir():
        file = path / WEIGHTS
        if not file.exists() and (path / "adapter_model.bin").exists():
            raise UnsupportedInputError(
                f"{path} holds only pickled weights (adapter_model.bin)",
                hint="save the adapter with safetensors first: save_pretrained(DIR)",
            )
    else:
        file = path
    if not file.is_file():
        raise SourceNotFoundError(
            f"{file}: no such file",
            hint=f"give the directory that holds {CONFIG} and {WEIGHTS}",
        )
    return file


def _check_config(file: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UnsupportedInputError(
            f"{file}: peft_type is {shown(config.get('peft_type'))}, only LORA can be merged"
        )
    for name in _UNSUPPORTED:
        if config.get(name):
            raise UnsupportedInputError(
                f"{file}: {name} is {shown(config[name])}, which cannot be merged",
                hint="merge it with PEFT's merge_and_unload, where PEFT can",
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init not in _HARMLESS_INITS:
        raise UnsupportedInputError(
            f"{file}: init_lora_weights is {shown(init)}, under which PEFT changed the backbone "
            "before training",
            hint="save the adapter as one of the unchanged backbone (PEFT: "
            "path_initial_model_for_weight_conversion)",
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not _is_number(rank) or not _is_number(alpha):
        raise CorruptFileError(f"{file}: r is {shown(rank)} and lora_alpha {shown(alpha)}")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict) or not all(map(_is_number, patterns.values())):
            raise CorruptFileError(
                f"{file}: {name} {shown(patterns)} does not map names to numbers"
            )
        for pattern in patterns:
            _compile(file, name, pattern)
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), str):
            _compile(file, name, config[name])


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300  # type: ignore[operator]


def _compile(file: Path, name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise CorruptFileError(f"{file}: {name}: {shown(pattern)} is not a pattern") from error


def _sorted(
    file: Path, tensors: Sequence[StoredTensor]
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, StoredTensor], dict[str, StoredTensor]]:
    """(module -> "A" and "B", name -> whole tensor, name -> frozen tensor)."""
    pairs: dict[str, dict[str, StoredTensor]] = {}
    whole: dict[str, StoredTensor] = {}
    frozen: dict[str, StoredTensor] = {}
    for tensor in tensors:
        name = tensor.name.removeprefix(PREFIX)
        if name == tensor.name:
            raise InputError(
                f"{file}: tensor {tensor.name!r}: the name does not begin with {PREFIX}",
                hint="give an adapter that PEFT's save_pretrained wrote",
            )
        if found := _PAIR.fullmatch(name) or _EMBEDDING.fullmatch(name):
            pairs.setdefault(found.group(1), {})[found.group(2)] = tensor
            continue
        if _MAGNITUDE.fullmatch(name):
            raise UnsupportedInputError(
                f"{file}: tensor {tensor.name!r}: DoRA, which cannot be merged",
                hint="merge it with PEFT's merge_and_unload, where PEFT can",
            )
        # PEFT saves the weight of an output embedding along with its pair, trained or not.
        kind = frozen if _BASE in name and not name.endswith(".bias") else whole
        plain = name.replace(_BASE, ".")
        if plain in kind:
            raise CorruptFileError(f"{file}: tensor {tensor.name!r}: {plain!r} is there twice")
        kind[plain] = tensor
    whole = {name: tensor for name, tensor in whole.items() if not _is_wrapped(name, whole)}
    if not pairs:
        raise InputError(f"{file}: no LoRA tensors in it")
    return pairs, whole, frozen


def _is_wrapped(name: str, whole: Collection[str]) -> bool:
    """Whether this is a bias of PEFT's wrapper of a module in ``modules_to_save``. Under ``bias:
    all`` PEFT saves them too: the trained bias again, and the one from before training."""
    for wrapper in _WRAPPERS:
        module, found, rest = name.partition(wrapper)
        if found and name.endswith("bias"):
            bare = rest.partition(".")[2]  # without the adapter's name
            return f"{module}.{rest}" in whole or f"{module}.{bare}" in whole
    return False


def _pair(
    file: Path, config: Mapping[str, Any], module: str, sides: Mapping[str, StoredTensor]
) -> Pair:
    embedding = any(_EMBEDDING.fullmatch(tensor.name) for tensor in sides.values())
    for side in "AB":
        if side not in sides:
            name = f"lora_embedding_{side}" if embedding else f"lora_{side}.weight"
            raise CorruptFileError(f"{file}: tensor '{PREFIX}{module}.{name}' missing")
        tensor = sides[side]
        if len(tensor.shape) != 2 or tensor.dtype not in FLOATS:
            raise UnsupportedInputError(
                f"{file}: tensor {tensor.name!r} is {tensor.dtype} {list(tensor.shape)}, "
                "not a floating-point matrix"
            )
    rank = _by_pattern(config, "rank_pattern", "r", module)
    alpha = _by_pattern(config, "alpha_pattern", "lora_alpha", module)
    for side, found in (("A", sides["A"].shape[0]), ("B", sides["B"].shape[1])):
        if found != rank or rank < 1:
            raise CorruptFileError(
                f"{file}: tensor {sides[side].name!r} is of rank {found}, {CONFIG} says {rank}",
                hint="give the adapter with the config that it was saved with",
            )
    root = math.sqrt(rank) if config.get("use_rslora") else rank
    return Pair(sides["A"], sides["B"], alpha / root, embedding)


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
