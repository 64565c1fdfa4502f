"""adapter_config.json of a trained adapter: what of it can be merged, checked before it is used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.header import shown
from loftq_cli.errors import CorruptFileError, UnsupportedInputError
from loftq_cli.families.experts import FUSED

_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
"""Settings under which a layer computes something else than (W + scaling * B A) x."""

_HARMLESS_INITS = ("eva", "gaussian", "orthogonal")
"""Initialisations by name that leave the backbone as it is; PEFT's others change its weights."""


def check_config(file: Path, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedInputError for what cannot be merged, CorruptFileError for what no PEFT
    writes."""
    if config.get("peft_type") != "LORA":
        raise UnsupportedInputError(
            f"{file}: peft_type is {shown(config.get('peft_type'))}, only LORA can be merged"
        )
    for name in _UNSUPPORTED:
        if config.get(name):
            raise UnsupportedInputError(
                f"{file}: {name} is {shown(config[name])}, which cannot be merged",
                hint="merge it with PEFT's merge_and_unload, if PEFT can",
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
    _check_parameters(file, config.get("target_parameters"))
    _check_patterns(file, config)
    check_tokens(file, config.get("trainable_token_indices"))


def _check_parameters(file: Path, names: object) -> None:
    """Parameters that PEFT adapts by their names: only those of fused experts are known."""
    if names and not (
        isinstance(names, list)
        and all(isinstance(name, str) and name.rpartition(".")[2] in FUSED for name in names)
    ):
        raise UnsupportedInputError(
            f"{file}: target_parameters is {shown(names)}, which cannot be merged",
            hint="merge it with PEFT's merge_and_unload, if PEFT can",
        )


def _check_patterns(file: Path, config: Mapping[str, Any]) -> None:
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


def check_tokens(file: Path, indices: object) -> None:
    """Raise CorruptFileError if ``indices``, a config's trainable_token_indices, are no tokens."""
    lists = list(indices.values()) if isinstance(indices, dict) else [indices or []]
    for numbers in lists:
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise CorruptFileError(
                f"{file}: trainable_token_indices {shown(indices)} is not a list of tokens"
            )


def token_indices(config: Mapping[str, Any], module: str) -> list[int] | None:
    """The rows of the embedding ``module`` that were trained one by one; None if the config does
    not say which."""
    indices = config.get("trainable_token_indices")
    if not isinstance(indices, dict):
        return indices or None
    for name, numbers in indices.items():
        if module == name or module.endswith(f".{name}"):
            return list(numbers)
    # A tied embedding is trained along with the one that is listed.
    return list(*indices.values()) if len(indices) == 1 else None


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300  # type: ignore[operator]


def _compile(file: Path, name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise CorruptFileError(f"{file}: {name}: {shown(pattern)} is not a pattern") from error
