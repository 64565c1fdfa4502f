"""``load()``: an output directory of ``loftq convert`` as a PeftModel that is ready to train."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.header import HeaderError, read_header, strict_json
from loftq_cli.checkpoint.output import open_output
from loftq_cli.errors import (
    CorruptFileError,
    EnvironmentFailure,
    InputError,
    SourceNotFoundError,
    UnsupportedInputError,
)
from loftq_cli.integrations import hook
from loftq_cli.layouts import adapter


def load(
    path: str | os.PathLike[str] = "out",
    auto_class: Any = None,
    trainable: bool = True,
    **from_pretrained: Any,
) -> Any:
    """The backbone in ``path`` with the adapter in its ``loftq_init`` attached.

    ``auto_class`` is the class to load the backbone with (``AutoModelForSequenceClassification``);
    without it, the one that config.json names. ``trainable`` makes the adapter's parameters
    trainable, and nothing else. Everything else is handed to the class's ``from_pretrained``.

    Returns a ``peft.PeftModel``. Raises EnvironmentFailure where the extra [train] or [gptq] is not
    installed, and InputError where ``path`` is not the complete output of a conversion, is of a
    newer format, or holds adapter tensors that the model has no place for.
    """
    directory = Path(path)
    layout = open_output(directory).manifest["recipe"]["layout"]
    peft, transformers = _required("peft", "train"), _required("transformers", "train")
    hook.install()
    model_class = auto_class or _model_class(directory, transformers)
    try:
        backbone = model_class.from_pretrained(directory, **from_pretrained)
    except ImportError as error:
        raise _missing_extra(error, "gptq" if layout == "gptq" else "train") from error
    file = directory / adapter.DIRECTORY / adapter.WEIGHTS
    stored = _tensor_names(file)
    # PEFT passes over tensors that it finds no module for, with a warning at most.
    modules = {name for name, _ in backbone.named_modules()}
    homeless = {name for name in stored if adapter.module_of(name) not in modules}
    _refuse(homeless, f"{type(backbone).__name__} has no place for", file)
    model = peft.PeftModel.from_pretrained(
        backbone, directory, subfolder=adapter.DIRECTORY, is_trainable=trainable
    )
    # PEFT counts a head that has an adapter among the adapter's own tensors, unless told not to.
    loaded = peft.get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    _refuse(loaded ^ stored, "PEFT and the file disagree about", file)
    return model


def _model_class(directory: Path, transformers: Any) -> Any:
    file = directory / "config.json"
    if not file.is_file():
        raise SourceNotFoundError(f"{directory}: no config.json in it", hint="convert again")
    architectures = _read_object(file).get("architectures") or [None]
    found = getattr(transformers, str(architectures[0]), None)
    if found is None:
        raise UnsupportedInputError(
            f"{file}: transformers has no class for architectures {architectures}",
            hint="say which to load with auto_class=, for example transformers.AutoModel",
        )
    return found


def _tensor_names(file: Path) -> set[str]:
    try:
        return {tensor.name for tensor in read_header(file).tensors}
    except FileNotFoundError:
        raise SourceNotFoundError(f"{file}: no such file", hint="convert again") from None
    except HeaderError as error:
        raise CorruptFileError(f"{file}: {error}", hint="convert again") from error


def _refuse(names: set[str], what: str, file: Path) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise InputError(
            f"{file}: {what} {', '.join(sorted(names)[:3])}{more}",
            hint="load the class that config.json names, without auto_class",
        )


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = strict_json(file.read_bytes())
    except ValueError as error:
        raise CorruptFileError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CorruptFileError(f"{file}: not a JSON object")
    return content


def _required(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise _missing_extra(error, extra) from error


def _missing_extra(error: ImportError, extra: str) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"loading needs a package that is not installed: {error}",
        hint=f'pip install "loftq-cli[{extra}]"',
    )
