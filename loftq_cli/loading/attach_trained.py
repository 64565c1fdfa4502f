"""A trained adapter on the backbone that it was trained on, every tensor in its place."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.header import HeaderError, StoredTensor, read_header
from loftq_cli.checkpoint.output import Output
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.checkpoint.small_file import read_json
from loftq_cli.errors import CorruptFileError, InputError, SourceNotFoundError, listed
from loftq_cli.families.names import key_mapping, places, prefix_of
from loftq_cli.families.token_tables import input_embeddings
from loftq_cli.layouts import adapter
from loftq_cli.layouts.trained import SAVE_BOTH, WRAPPERS, refuse_other_forms
from loftq_cli.layouts.trained_config import check_tokens, token_indices
from loftq_cli.loading.attach_start import differs
from loftq_cli.loading.trained_beside import refuse_other_conversion

_TOKENS = ".token_adapter."
_INSIDE = (".lora_", _TOKENS, ".base_layer.", *WRAPPERS)
_TABLE = re.compile(r"(?:\.token_adapter)?(?:\.base_layer)?\.weight")
_OTHER = "load the class that was trained, on the conversion that it was trained on"


def attach_trained(peft: Any, backbone: Any, output: Output, place: Path, trainable: bool) -> Any:
    """The PeftModel of ``backbone``, which was loaded from ``output``, with the adapter that PEFT
    saved in ``place``. Embeddings are resized to the length that the adapter has them in.

    Raises SourceNotFoundError if there is no adapter, InputError if it was trained on another
    conversion, or holds a tensor that the model has no place for, or lacks one.
    """
    file = place / adapter.WEIGHTS
    refuse_other_forms(place)
    if not file.is_file() or not (place / adapter.CONFIG).is_file():
        raise SourceNotFoundError(
            f"{place}: no {adapter.CONFIG} with {adapter.WEIGHTS}",
            hint="give the directory that PEFT's save_pretrained wrote",
        )
    stated = read_json(place / adapter.CONFIG).content
    refuse_other_conversion(output, file, stated)
    check_tokens(place / adapter.CONFIG, stated.get("trainable_token_indices"))
    try:
        stored = {tensor.name: tensor for tensor in read_header(file).tensors}
    except HeaderError as error:
        raise CorruptFileError(f"{file}: {error}") from error
    names = _names(backbone, file, stored)
    _resize(backbone, stored, names)
    trained = {_module_of(name) for name in stored if _TOKENS in name}
    _refuse_tokens_beyond(backbone, file, stated, {name: names[name] for name in trained})
    config = peft.PeftConfig.from_pretrained(place)
    _rename(config, names)
    config.base_model_name_or_path = str(output.directory.absolute())
    try:
        model = peft.PeftModel.from_pretrained(
            backbone,
            place,
            is_trainable=trainable,
            config=config,
            key_mapping=key_mapping(names, prefix_of(backbone)),
        )
    except RuntimeError as error:  # torch lists what is of another shape
        raise InputError(f"{file}: PEFT did not load it: {error}", hint=_OTHER) from error
    _check(peft, model, file, stored, names)
    return model


def _names(backbone: Any, file: Path, stored: Collection[str]) -> dict[str, str]:
    """Every module that the file has something for: its name there, and in ``backbone``."""
    present = {name for name, _ in backbone.named_modules()}
    modules = {_module_of(name) for name in stored}
    names = {module: module for module in modules if module in present}
    names |= places(backbone, modules - names.keys())
    homeless = {name for name in stored if _module_of(name) not in names}
    _refuse(homeless, f"{type(backbone).__name__} has no place for", file)
    return names


def _module_of(name: str) -> str:
    """The module that a tensor in the file of a trained adapter belongs to."""
    name = name.removeprefix(adapter.PREFIX)
    ends = [name.index(mark) for mark in _INSIDE if mark in name]
    return name[: min(ends)] if ends else name.rpartition(".")[0]


def _resize(backbone: Any, stored: Mapping[str, StoredTensor], names: Mapping[str, str]) -> None:
    """As many rows for ``backbone``'s embeddings as the adapter has of them."""
    own = input_embeddings(backbone)
    for name, tensor in stored.items():
        module = _module_of(name)
        part = name.removeprefix(adapter.PREFIX).removeprefix(module)
        is_table = own is backbone.get_submodule(names[module]) and _TABLE.fullmatch(part)
        if is_table and tensor.shape[1:] == (own.embedding_dim,):
            if tensor.shape[0] != own.num_embeddings:
                backbone.resize_token_embeddings(tensor.shape[0], mean_resizing=False)
            return


def _refuse_tokens_beyond(
    backbone: Any, file: Path, config: Mapping[str, Any], names: Mapping[str, str]
) -> None:
    """Raise InputError if a row that was trained lies beyond one of the embeddings ``names``."""
    for module, name in names.items():
        rows = getattr(backbone.get_submodule(name), "num_embeddings", None)
        last = max(token_indices(config, module) or (), default=-1)
        if rows is not None and last >= rows:
            raise InputError(
                f"{file}: {adapter.CONFIG} lists token {last} of {module!r}, which has {rows}, and "
                "the embedding that was resized is not in the adapter",
                hint=SAVE_BOTH,
            )


def _rename(config: Any, names: Mapping[str, str]) -> None:
    """The modules of PEFT's ``config`` as the model names them."""
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        listed = getattr(config, key, None)
        if listed is not None and not isinstance(listed, str):
            setattr(config, key, type(listed)(names.get(entry, entry) for entry in listed))
    patterns = {re.escape(old): re.escape(new) for old, new in names.items()}
    for key in ("rank_pattern", "alpha_pattern"):
        renamed = {patterns.get(k, k): v for k, v in (getattr(config, key, None) or {}).items()}
        setattr(config, key, renamed)


def _check(
    peft: Any,
    model: Any,
    file: Path,
    stored: Mapping[str, StoredTensor],
    names: Mapping[str, str],
) -> None:
    """Raise InputError if PEFT has something else than the file, dtypes apart."""
    wanted = {}
    for name, tensor in stored.items():
        if not any(mark in name for mark in WRAPPERS):  # of these PEFT has copies under plain names
            wanted[name.replace(_module_of(name), names[_module_of(name)], 1)] = tensor
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    _refuse(own.keys() - wanted.keys(), "it lacks", file)
    tables = input_embeddings(model.get_base_model()) is not None  # PEFT asks for them unguarded
    loaded = own | peft.get_peft_model_state_dict(model, save_embedding_layers=tables)
    _refuse(wanted.keys() - loaded.keys(), "PEFT found no place for", file)
    with TensorFile(file) as reader:
        lost = {
            name for name, tensor in wanted.items() if differs(loaded[name], reader.read(tensor))
        }
    _refuse(lost, "PEFT did not load", file)


def _refuse(names: set[str], what: str, file: Path) -> None:
    if names:
        raise InputError(f"{file}: {what} {listed(sorted(names))}", hint=_OTHER)
