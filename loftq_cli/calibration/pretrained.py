"""The original model and its tokenizer, as transformers loads them, wherever they fit."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loftq_cli.calibration.layer_inputs import OWN_LOOP
from loftq_cli.checkpoint.companions import is_vocabulary
from loftq_cli.errors import InputError, SourceNotFoundError, UnsupportedInputError
from loftq_cli.families.classes import model_class
from loftq_cli.machine import launched
from loftq_cli.machine.packages import missing_extra, required
from loftq_cli.machine.resources import available_memory

_DOING = "calibrating"
# Shares of the free memory that weights may take; the rest is for activations and moments.
_WHOLE, _PART = 0.7, 0.5


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in ``directory``. Raises SourceNotFoundError if there is none, InputError
    if it cannot be read, EnvironmentFailure if a package is missing."""
    transformers = required("transformers", "train", _DOING)
    if not any(is_vocabulary(path.name) and path.is_file() for path in directory.iterdir()):
        raise SourceNotFoundError(
            f"{directory}: no tokenizer in it",
            hint=f"add the model's tokenizer files, or {OWN_LOOP}",
        )
    try:
        with quiet(transformers):
            return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except ImportError as error:
        raise missing_extra(error, "train", _DOING) from error
    except Exception as error:  # of any kind
        raise InputError(f"{directory}: the tokenizer cannot be read: {_line(error)}") from error


def class_of(directory: Path, config: Mapping[str, Any]) -> Any:
    """The class of transformers for the model in ``directory``. Raises UnsupportedInputError if
    there is none, EnvironmentFailure if the extra [train] is missing."""
    transformers = required("transformers", "train", _DOING)
    found = model_class(config, transformers)
    if found is None:
        named = config.get("architectures") or config.get("model_type")
        raise UnsupportedInputError(
            f"{directory / 'config.json'}: transformers has no class for architectures {named}",
            hint=OWN_LOOP,
        )
    return found


def load_model(
    directory: Path,
    loaded_as: Any,
    *,
    dtype: torch.dtype,
    nbytes: int,
    device: torch.device,
    offload_folder: Path,
) -> nn.Module:
    """The model of ``directory``, of the class ``loaded_as``, in ``dtype``, for evaluation.

    ``nbytes`` is what its weights take. If they do not fit on ``device``, blocks are left in
    host memory, and if they do not fit there, on disk (``offload_folder``, if the files of
    the checkpoint cannot be read directly). Raises InputError if transformers cannot load it
    or finds no weights for a block.
    """
    transformers = required("transformers", "train", _DOING)
    required("accelerate", "train", _DOING)
    try:
        with quiet(transformers):
            model, report = loaded_as.from_pretrained(
                directory,
                dtype=dtype,
                output_loading_info=True,
                local_files_only=True,
                **_placement(nbytes, device, offload_folder),
            )
    except ImportError as error:
        raise missing_extra(error, "train", _DOING) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{directory}: transformers cannot load it: {_line(error)}") from error
    _check_complete(model, report, directory)
    for part in model.modules():
        if getattr(getattr(part, "config", None), "use_cache", False):
            part.config.use_cache = False
    result: nn.Module = model.eval()
    return result


def _check_complete(model: Any, report: Mapping[str, Any], directory: Path) -> None:
    """Raise InputError if a weight in or before the blocks was drawn at random."""
    absent = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    for name in sorted(absent):
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Embedding) or any(part.isdecimal() for part in name.split(".")):
            raise InputError(f"{directory}: {type(model).__name__} does not find {name} in it")


def fits(nbytes: int, device: torch.device) -> bool:
    """Whether weights of so many bytes fit on ``device`` whole."""
    room = _room(device)
    return room is None or nbytes <= _WHOLE * room


def _placement(nbytes: int, device: torch.device, folder: Path) -> dict[str, Any]:
    """Arguments of from_pretrained that put the weights where there is room."""
    if fits(nbytes, device):
        return {} if device.type == "cpu" else {"device_map": {"": device}}
    room, limits = _room(torch.device("cpu")), dict[int | str, int]()
    if device.type != "cpu":
        limits[device.index or 0] = int(_PART * (_room(device) or 0))
    limits["cpu"] = nbytes if room is None else int(_PART * room)
    return {"device_map": "auto", "max_memory": limits, "offload_folder": str(folder)}


def _room(device: torch.device) -> int | None:
    """Bytes for weights: every block is read once a window, which swap would make slow. Of several
    processes on one host each has its share."""
    found = available_memory(device, swap=False)
    return None if found is None else found // launched.beside(device.type)


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Remarks and bars of transformers, and of what it imports, off; errors are raised."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # theirs to one another
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
