"""Registers the quantizer ``loftq`` with transformers, whichever of the two is imported first.

transformers offers no entry points, so either it is there already, or we wait for it: a finder
at the front of ``sys.meta_path`` lets the module that holds its registry load as usual and
registers right after. Nothing here imports torch or transformers.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from loftq_cli.errors import EnvironmentFailure

_REGISTRY = "transformers.quantizers.auto"


class DetachedAdapter(UserWarning):
    """A backbone computes, or will, without the adapter that makes up for its quantization."""


def install() -> None:
    """Register now if transformers' registry is loaded, else once it is. Idempotent."""
    module = sys.modules.get(_REGISTRY)
    if module is not None:
        _register(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the registry as the others would, with a loader that registers afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _RegisteringLoader(spec.loader, self)
                    return spec
        return None


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module is to look as if we had never been here: tools ask the loader for its source.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _register(module)


def _register(registry: Any) -> None:
    configs = getattr(registry, "AUTO_QUANTIZATION_CONFIG_MAPPING", {})
    if "loftq" in configs:
        return
    try:
        quantizer = importlib.import_module("loftq_cli.integrations.quantizer")
        if "loftq" in configs or not hasattr(quantizer, "LoftqQuantizer"):
            return  # it installs itself at its end; without the class it is not there yet
        registry.register_quantization_config("loftq")(quantizer.LoftqConfig)
        registry.register_quantizer("loftq")(quantizer.LoftqQuantizer)
    except (ImportError, AttributeError) as error:
        # Whoever loads no loftq checkpoint need not know; who does meets the stand-in.
        configs["loftq"] = _stand_in(error)


def _stand_in(error: Exception) -> type:
    class Unavailable:
        """In the registry where the real config class could not be: says why when it is used."""

        @classmethod
        def from_dict(cls, *args: Any, **kwargs: Any) -> NoReturn:
            raise EnvironmentFailure(
                f"this version of transformers does not take the quantizer loftq: {error}",
                hint='pip install "loftq-cli[train]"',
            ) from error

    return Unavailable
