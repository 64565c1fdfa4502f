"""Which layers of a model read what each of its norms gives.

Nobody's table says so: the model is run once on the meta device, where nothing is computed, and
what every tensor is read by is seen.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loftq_cli.families.modules import kind_of
from loftq_cli.families.skeleton import silence, skeleton

_TOKENS = 4


@dataclass(frozen=True)
class Readers:
    """What reads a norm's output: ``linears``, modules in memory that take it as it is; ``others``,
    modules whose own code computes with it. ``offset``: what the norm adds to its weight before it
    multiplies with it, 1 in Gemma's, else 0; None if it does something else with it."""

    linears: tuple[str, ...]
    others: tuple[str, ...]
    offset: float | None


def norm_readers(config: Mapping[str, Any]) -> Mapping[str, Readers] | str:
    """The readers of each norm of the model of ``config``, the content of a config.json, by its
    name in memory; or, if it cannot be followed, why. Norms that are not called are left out."""
    model = skeleton(config)
    if isinstance(model, str):
        return model
    seen = _Seen(model)
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    given = {"input_ids": ids}
    if config.get("is_encoder_decoder"):
        given["decoder_input_ids"] = ids
    try:
        with silence(), torch.no_grad(), seen.watching(), seen:
            model(**given)
    except Exception as error:  # of any kind: the code is the family's
        line = (str(error).strip().splitlines() or [""])[0]
        return f"{type(model).__name__} cannot be followed: {type(error).__name__}: {line[:200]}"
    return {
        name: Readers(tuple(linears), tuple(others), _offset(model.get_submodule(name)))
        for name, (linears, others) in seen.found.items()
    }


class _Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes who reads the outputs of norms. An output is known again by its storage, which views
    share."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
        self._model = model
        self._norms: dict[int, str] = {}
        self._held: list[torch.Tensor] = []  # lest another storage comes to lie at its address
        self._around: list[str] = []
        self._inside = 0  # linear layers

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the modules' calls."""
        handles = []
        for name, module in self._model.named_modules():

            def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                self._around.append(name)
                if kind_of(module) in ("linear", "conv1d"):
                    self._inside += 1
                    self._read(tree_leaves((args, kwargs)), name, linear=True)

            def leave(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                self._around.pop()
                if kind_of(module) in ("linear", "conv1d"):
                    self._inside -= 1
                elif _is_norm(module) and isinstance(output, torch.Tensor):
                    self._held.append(output)
                    self._norms[_storage(output)] = name
                    self.found.setdefault(name, ({}, {}))

            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        made = func(*args, **(kwargs or {}))
        if not self._inside:
            own = {_storage(each) for each in tree_leaves(made) if isinstance(each, torch.Tensor)}
            read = [
                each
                for each in tree_leaves((args, kwargs))
                if isinstance(each, torch.Tensor) and _storage(each) not in own  # a view
            ]
            self._read(read, self._around[-1] if self._around else "", linear=False)
        return made

    def _read(self, tensors: list[Any], reader: str, *, linear: bool) -> None:
        for tensor in tensors:
            norm = self._norms.get(_storage(tensor)) if isinstance(tensor, torch.Tensor) else None
            if norm is not None:
                self.found[norm][0 if linear else 1][reader] = None


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has a vector as its weight and nothing below it."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1 and not any(True for _ in module.children())


def _offset(module: nn.Module) -> float | None:
    """What ``module`` adds to its weight: found by running it, with zeros and with ones."""
    own = copy.deepcopy(module).to_empty(device="cpu").float()
    width = len(own.get_parameter("weight"))
    inputs = torch.linspace(-1, 2, width)[None] if width > 1 else torch.ones(1, 1)
    found = []
    with torch.no_grad():
        for value in (0.0, 1.0):
            for name, parameter in own.named_parameters():
                parameter.fill_(value if name == "weight" else 0.0)
            found.append(own(inputs).double())
    nothing, once = found
    if not bool(nothing.any()):
        return 0.0 if bool(once.any()) else None
    return 1.0 if torch.allclose(once, 2 * nothing, rtol=1e-5) else None
