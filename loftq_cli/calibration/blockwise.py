"""A model run block by block: every window of text through one block, then through the next.

The model's own code does everything between the blocks. To run block n, the model is called with
block n - 1 replaced by what it gave for the window, and left when block n has returned. Embeddings,
masks, position biases, the norm behind an encoder and whatever else a family has are computed anew
each time, which costs little beside a block; nothing about a family has to be known. Only one
block's weights are needed at a time, and of the activations only what the last block gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

Run = Callable[[int], object]
"""Calls the model with the window of this number."""


class Stop(BaseException):
    """Leaves the model's forward behind the block that was to run; not an error to handle."""


class OutOfTurnError(Exception):
    """The model does not hand what one block gives to the next, and nothing else."""


_R = TypeVar("_R", bound="Replacing")


class Replacing:
    """Has blocks give what is known already. On leaving the context the model is as it was."""

    def __init__(self) -> None:
        self._replaced: list[tuple[nn.Module, object]] = []

    def __enter__(self: _R) -> _R:
        return self

    def __exit__(self, *raised: object) -> None:
        for block, forward in self._replaced:
            del block.forward
            if forward is not None:
                block.__dict__["forward"] = forward

    def replace(self, block: nn.Module, known: Callable[[], Any]) -> None:
        """From now on calls of ``block`` return what ``known`` gives, a copy of it."""
        self._replaced.append((block, block.__dict__.get("forward")))
        block.forward = lambda *args, **kwargs: fresh(known())


class BlockRunner(Replacing):
    """Runs blocks one after the other, in the order in which the model calls them, over the windows
    of these numbers."""

    def __init__(self, model: nn.Module, run: Run, windows: Sequence[int]) -> None:
        super().__init__()
        self._model = model
        self._run = run
        self._windows = windows
        self._window = 0
        self._outputs: dict[str, dict[int, Any]] = {}  # of each stack's last finished block

    def windows(self, name: str) -> Iterator[int]:
        """Run block ``name`` on every window; yields after each. Then what it gave replaces it.

        Raises OutOfTurnError if the model does not get to the block.
        """
        block = self._model.get_submodule(name)
        stack = name.rpartition(".")[0]
        outputs = self._outputs.setdefault(stack, {})
        with resident(block):
            first = None
            for window in self._windows:
                self._window = window
                outputs[window] = kept(self._output(block), first)
                first = outputs[window] if first is None else first
                yield window
        self.replace(block, lambda: outputs[self._window])

    def _output(self, block: nn.Module) -> Any:
        given: list[Any] = []

        def stop(module: nn.Module, args: object, output: Any) -> None:
            given.append(output)
            raise Stop

        handle = block.register_forward_hook(stop)
        try:
            self._run(self._window)
        except Stop:
            return given[0]
        finally:
            handle.remove()
        raise OutOfTurnError


@contextmanager
def resident(block: nn.Module) -> Iterator[None]:
    """Keep the weights of a block that accelerate has offloaded in memory, instead of loading them
    anew for every call."""
    hooks: list[tuple[nn.Module, Any]]
    hooks = [(part, getattr(part, "_hf_hook", None)) for part in block.modules()]
    offloaded = [(part, hook) for part, hook in hooks if getattr(hook, "offload", False)]
    for part, hook in offloaded:
        hook.pre_forward(part)
        hook.offload = False
    try:
        yield
    finally:
        for part, hook in offloaded:
            hook.offload = True
            hook.post_forward(part, None)


@dataclass(frozen=True)
class Kept:
    """A tensor on the CPU, and where it was."""

    tensor: torch.Tensor
    device: torch.device


def kept(
    value: Any, twin: Any, hold: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
) -> Any:
    """``value`` with its tensors moved to the CPU, where ``hold`` may put them elsewhere; tensors
    that equal those of ``twin``, which is the same of another window, are kept once."""
    if isinstance(value, torch.Tensor):
        host = value.detach().cpu()
        known = isinstance(twin, Kept) and torch.equal(host, twin.tensor)
        return Kept(twin.tensor if known else hold(host), value.device)
    if type(value) in (tuple, list):
        twins = twin if isinstance(twin, (tuple, list)) else [None] * len(value)
        return type(value)(kept(*pair, hold) for pair in zip(value, twins))
    return value


def fresh(value: Any) -> Any:
    """What :func:`kept` kept, as the block returned it: copies, as callers may write to it."""
    if isinstance(value, Kept):
        return value.tensor.to(value.device, copy=True)
    if type(value) in (tuple, list):
        return type(value)(fresh(item) for item in value)
    return value
