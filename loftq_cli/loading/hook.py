"""What transformers and PEFT learn from us, whichever of the three is imported first.

transformers gets the quantizer ``loftq``; PEFT gets to know which backbone a ``loftq_init`` belongs
to. Neither offers entry points, so either it is there already, or we wait for it: a finder at the
front of ``sys.meta_path`` lets the module concerned load as usual and acts right after. Nothing is
imported here before they are.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from loftq_cli.errors import EnvironmentFailure


def install() -> None:
    """Act on what is loaded, wait for what is not. Idempotent."""
    for name, act in _WATCHED.items():
        module = sys.modules.get(name)
        waiting = any(isinstance(f, _Finder) and f.name == name for f in sys.meta_path)
        if module is not None:
            act(module)
        elif not waiting:
            sys.meta_path.insert(0, _Finder(name, act))


class _Finder(MetaPathFinder):
    """Finds the module ``name`` as the others would, with a loader that acts afterwards."""

    def __init__(self, name: str, act: Callable[[Any], None]) -> None:
        self.name = name
        self.act = act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _ActingLoader(spec.loader, self)
                    return spec
        return None


class _ActingLoader(Loader):
    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        self._finder.act(module)


def _register(registry: Any) -> None:
    configs = getattr(registry, "AUTO_QUANTIZATION_CONFIG_MAPPING", {})
    if "loftq" in configs:
        return
    try:
        quantizer = importlib.import_module("loftq_cli.loading.quantizer")
        if hasattr(quantizer, "register"):  # else it is being imported, and registers at its end
            quantizer.register(registry)
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


def _name_backbones(config: Any) -> None:
    """Have PEFT's configurations say where the backbone of a ``loftq_init`` lies. The file cannot,
    as the directory may be moved; with it AutoPeftModel finds the backbone, and PEFT notices that
    embeddings were resized."""
    mixin: Any = getattr(config, "PeftConfigMixin", None)
    original = getattr(getattr(mixin, "from_pretrained", None), "__func__", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def from_pretrained(cls: Any, path: Any, subfolder: Any = None, **kwargs: Any) -> Any:
        found = original(cls, path, subfolder, **kwargs)
        if getattr(found, "base_model_name_or_path", "") is None:
            found.base_model_name_or_path = _backbone_of(str(path), subfolder)
        return found

    made: Any = from_pretrained
    mixin.from_pretrained = classmethod(made)


def _backbone_of(path: str, subfolder: str | None) -> str | None:
    """The directory or hub id of the backbone beside the adapter in ``path``/``subfolder``."""
    # Imported here: torch is loaded by now, with PEFT.
    from loftq_cli.checkpoint.output import MANIFEST
    from loftq_cli.layouts.adapter import DIRECTORY

    if subfolder == DIRECTORY:
        return path
    parent, name = os.path.split(os.path.abspath(path))
    beside = name == DIRECTORY and os.path.isfile(os.path.join(parent, MANIFEST))
    return parent if beside and subfolder is None else None


_WATCHED: dict[str, Callable[[Any], None]] = {
    "transformers.quantizers.auto": _register,
    "peft.config": _name_backbones,
}
