"""The adapter that a conversion starts with on its backbone, every tensor in its place."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.header import HeaderError, StoredTensor, read_header
from loftq_cli.checkpoint.output import Output
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.errors import CorruptFileError, InputError, SourceNotFoundError, listed
from loftq_cli.families.classes import takes_text
from loftq_cli.families.experts import is_expert
from loftq_cli.families.names import key_mapping, places, places_of_parameters, prefix_of, tied
from loftq_cli.families.parts import left_out
from loftq_cli.families.tasks import task_type
from loftq_cli.layouts import adapter as adapters
from loftq_cli.layouts.base import matrix_of
from loftq_cli.numerics.metrics import squared_norm

_ROUNDED = 0.01  # of a sum of squares, at most, by the dtype that the adapter is loaded in


def names_in(backbone: Any, output: Output) -> dict[str, str]:
    """Every module that has an adapter: its name in the file, and in ``backbone``, which may be a
    part of the model. Experts, which are no modules there, are left to PEFT. Raises InputError if
    the adapter has tensors of modules that ``backbone`` lacks."""
    file = output.directory / adapters.DIRECTORY / adapters.WEIGHTS
    stored = {name for name in _tensors(file) if not is_expert(name)}
    on_disk = {matrix.adapted: matrix.module for matrix in map(matrix_of, output.records)}
    present = places(backbone, on_disk.values())
    outside = left_out(backbone, on_disk.values(), present)
    names = {name: present[module] for name, module in on_disk.items() if module in present}
    modules = {adapters.module_of(name) for name in stored}
    modules = {name for name in modules if on_disk.get(name) not in outside}
    # PEFT passes over tensors that it finds no module for, with a warning at most.
    homeless = {name for name in stored if adapters.module_of(name) in modules - names.keys()}
    _refuse(homeless, f"{type(backbone).__name__} has no place for", file)
    return {name: names[name] for name in modules}


def refuse_tied(backbone: Any, names: Mapping[str, str], directory: Path) -> None:
    """Raise InputError if a module without an adapter has the weight of one with: it would get Q
    alone, and nothing would say so."""
    if pair := tied(backbone, names.values()):
        raise InputError(
            f"{directory}: {type(backbone).__name__} ties {pair[0]} to {pair[1]}, and only one of "
            "them has the adapter",
            hint="load a class without that head, or convert without --embeddings",
        )


def attach_start(
    peft: Any, backbone: Any, names: Mapping[str, str], directory: Path, trainable: bool
) -> Any:
    """The PeftModel of ``backbone``, which was loaded from ``directory``, with the adapter there;
    ``names`` as :func:`names_in` finds them. Raises InputError if a tensor of the adapter has no
    place, or PEFT has loaded it otherwise."""
    config = peft.PeftConfig.from_pretrained(directory, subfolder=adapters.DIRECTORY)
    file = directory / adapters.DIRECTORY / adapters.WEIGHTS
    stored = _tensors(file)
    experts = {adapters.module_of(name) for name in stored if is_expert(name)}
    homes = _homes(backbone, config.target_parameters or (), file)  # of experts in PEFT's own form
    config.target_modules = {*names.values()} | (set() if homes else experts)
    if homes:
        config.target_parameters = [
            f"{homes[home]}.{leaf}"
            for home, _, leaf in (name.rpartition(".") for name in config.target_parameters)
        ]
    patterns = {re.escape(old): re.escape(new) for old, new in names.items()}
    config.rank_pattern = _renamed(config.rank_pattern, patterns)
    config.alpha_pattern = _renamed(config.alpha_pattern, patterns)
    config.task_type = task_type([type(backbone).__name__], takes_text=takes_text(backbone))
    model = peft.PeftModel.from_pretrained(
        backbone,
        directory,
        subfolder=adapters.DIRECTORY,
        is_trainable=trainable,
        config=config,
        key_mapping=key_mapping({**names, **homes}, prefix_of(backbone)),
    )
    expected = {}
    for name, tensor in stored.items():
        module = adapters.module_of(name).removesuffix(".base_layer")
        if module in names:
            expected[name.replace(module, names[module], 1)] = tensor
        elif module in homes:
            expected[name.replace(module, homes[module], 1)] = tensor
    # PEFT counts a head that has an adapter among the adapter's own tensors, unless told not to.
    loaded = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    fused = {name for name in loaded if is_expert(name)} - expected.keys()
    _refuse((loaded.keys() - fused) ^ expected.keys(), "PEFT and the file disagree about", file)
    taken = {tensor.name for tensor in expected.values()}
    parts = [stored[name] for name in stored if is_expert(name) and name not in taken]
    with TensorFile(file) as reader:
        unfused = _unfused({name: loaded[name] for name in fused}, parts, reader)
        lost = {name for name in expected if differs(loaded[name], reader.read(expected[name]))}
    _refuse(unfused, "PEFT did not fuse", file)
    _refuse(lost, "PEFT did not load", file)
    return model


def _unfused(
    fused: Mapping[str, Any], parts: Sequence[StoredTensor], reader: TensorFile
) -> set[str]:
    """The names of what PEFT did not fuse from the ``parts`` in a file, as far as can be told:
    stacking keeps the sum of all squares, and a B that it found nothing for is zero."""
    if any(tensor.is_meta for tensor in fused.values()):
        return set()
    squares = {name: squared_norm(tensor.cpu()) for name, tensor in fused.items()}
    given = math.fsum(squared_norm(reader.read(part)) for part in parts)
    if math.isclose(math.fsum(squares.values()), given, rel_tol=_ROUNDED):
        return set()
    empty = {name for name, square in squares.items() if ".lora_B." in name and not square}
    return empty or {*squares} or {part.name for part in parts}


def _homes(backbone: Any, parameters: Iterable[str], file: Path) -> dict[str, str]:
    """The modules whose ``parameters`` have adapters: names in the file, and in ``backbone``."""
    found = places_of_parameters(backbone, parameters)
    homeless = {name for name, place in found.items() if place is None}
    _refuse(homeless, f"{type(backbone).__name__} has no place for", file)
    ends = ((old, new) for old, new in found.items() if new is not None)
    return {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in ends}


def differs(loaded: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether PEFT has something else than the file, dtypes apart. What is on disk is trusted."""
    return not loaded.is_meta and not torch.equal(loaded.cpu(), stored.to(loaded.dtype))


def _renamed(patterns: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(pattern, pattern): value for pattern, value in patterns.items()}


def _tensors(file: Path) -> dict[str, StoredTensor]:
    try:
        return {tensor.name: tensor for tensor in read_header(file).tensors}
    except FileNotFoundError:
        raise SourceNotFoundError(f"{file}: no such file", hint="convert again") from None
    except HeaderError as error:
        raise CorruptFileError(f"{file}: {error}", hint="convert again") from error


def _refuse(names: set[str], what: str, file: Path) -> None:
    if names:
        raise InputError(
            f"{file}: {what} {listed(sorted(names))}",
            hint="load the class that config.json names, without auto_class",
        )
