"""The model that a config.json describes, without weights: every module on the meta device."""

from __future__ import annotations

import contextlib
import importlib
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loftq_cli.families.classes import model_class

_MOST = 10_000  # of anything that a config.json counts: each becomes a module
_COUNTS = ("layer", "expert", "block", "depth", "group", "label", "stage", "head")
_SIZES = ("size", "dim", "vocab", "theta", "token")


def skeleton(config: Mapping[str, Any]) -> nn.Module | str:
    """The model of ``config``, the content of a config.json, on the meta device, weights tied as
    transformers ties them; or, if there is none, why: transformers is missing, does not know the
    architecture, or cannot build it."""
    return _built(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=4)
def _built(text: str) -> nn.Module | str:
    config = json.loads(text)
    try:
        transformers: Any = importlib.import_module("transformers")
        initialization: Any = importlib.import_module("transformers.initialization")
    except ImportError:
        return 'transformers is not installed (pip install "loftq-cli[train]")'
    if _is_excessive(config):
        return "config.json counts more layers than a model has"
    with silence():
        try:
            found = model_class(config, transformers)
            if found is None:
                return f"transformers has no class for {_named(config)}"
            settings = _settings(found.config_class, config)
            with torch.device("meta"), initialization.no_init_weights():
                model: nn.Module = found(settings)
            model.tie_weights()  # type: ignore[operator]
        except Exception as error:  # of any kind: the config is somebody else's
            line = (str(error).strip().splitlines() or [""])[0]
            return f"transformers cannot build it: {type(error).__name__}: {line[:200]}"
    return model.eval()


def _settings(config_class: Any, config: Mapping[str, Any]) -> Any:
    """The configuration, read from a file as transformers reads one: files spell some values, such
    as infinity, in a way of their own."""
    stated = {key: value for key, value in config.items() if key != "quantization_config"}
    with tempfile.TemporaryDirectory(prefix="loftq-config-") as folder:
        Path(folder, "config.json").write_text(json.dumps(stated), "utf-8")
        return config_class.from_pretrained(folder, local_files_only=True)


def _named(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or [config.get("model_type")]
    return str(names[0])


def _is_excessive(value: Any, key: str = "") -> bool:
    """Whether a number of layers, experts, … would make building the model endless."""
    if isinstance(value, dict):
        return any(_is_excessive(item, str(name)) for name, item in value.items())
    if isinstance(value, list):
        return any(_is_excessive(item, key) for item in value)
    counts = any(word in key for word in _COUNTS) and not any(word in key for word in _SIZES)
    return counts and isinstance(value, (int, float)) and value > _MOST


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Remarks of transformers, which is there, about a config are for those who load the model."""
    logging: Any = importlib.import_module("transformers").utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
