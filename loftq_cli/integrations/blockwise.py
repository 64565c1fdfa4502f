"""A model run block by block: every window of text through one block, then through the next.

The model's own code does everything between the blocks. To run block n, the model is called with
block n - 1 replaced by what it gave for the window, and left when block n has returned. Embeddings,
masks, position biases, the norm behind an encoder and whatever else a family has are computed anew
each time, which costs little beside a block; nothing about a family has to be known. Only one
block's weights are needed at a time, and of the activations only what the last block gave.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loftq_cli.errors import UnsupportedInputError

Run = Callable[[int], object]
"""Calls the model with the window of this number."""

_SAMPLE = 4096  # values by which a block's input is known again
_TOLERANCE = 0.01  # of their standard deviation


class _Stop(Exception):
    """Leaves the model's forward behind the block that was to run."""


class OutOfTurnError(Exception):
    """The model does not hand what one block gives to the next, and nothing else."""


def block_of(model: nn.Module, module: str) -> str | None:
    """The block that ``module`` lies in: a child of the outermost list of modules around it."""
    parent: nn.Module = model
    parts = module.split(".")
    for depth, part in enumerate(parts, start=1):
        if isinstance(parent, nn.ModuleList):
            return ".".join(parts[:depth])
        parent = parent.get_submodule(part)
    return None


def blocks_in_turn(model: nn.Module, run: Run, stacks: Collection[str]) -> list[str]:
    """The blocks of ``stacks`` (paths of ModuleLists), in the order in which the model calls them.

    Calls the model on window 0, twice: as it is, and block by block. Blocks that it does not call
    are left out. Raises OutOfTurnError where a block is called twice, or gets another input than
    in the model as it is.
    """
    names = [f"{stack}.{name}" for stack in stacks for name, _ in _children(model, stack)]
    called: list[tuple[str, torch.Tensor]] = []
    with _watched(model, names, lambda name, sample: called.append((name, sample))):
        run(0)
    order = [name for name, _ in called]
    if len(set(order)) < len(order):
        raise OutOfTurnError
    seen: list[tuple[str, torch.Tensor]] = []
    with BlockRunner(model, run, 1) as runner:
        for name in order:
            with _watched(model, [name], lambda name, sample: seen.append((name, sample))):
                try:
                    for _ in runner.windows(name):
                        pass
                # It ran as a whole: what it misses now is what an earlier block did on the side.
                except (LookupError, AttributeError, TypeError, ValueError) as error:
                    raise OutOfTurnError from error
    if not all(_alike(found[1], expected[1]) for found, expected in zip(seen, called)):
        raise OutOfTurnError
    return order


class BlockRunner:
    """Runs blocks one after the other, in the order of :func:`blocks_in_turn`, over ``count``
    windows. On leaving the context the model is as it was."""

    def __init__(self, model: nn.Module, run: Run, count: int) -> None:
        self._model = model
        self._run = run
        self._count = count
        self._window = 0
        self._outputs: dict[str, list[Any]] = {}  # of each stack's last finished block
        self._replaced: list[tuple[nn.Module, object]] = []

    def __enter__(self) -> BlockRunner:
        return self

    def __exit__(self, *raised: object) -> None:
        for block, forward in self._replaced:
            del block.forward
            if forward is not None:
                block.__dict__["forward"] = forward

    def windows(self, name: str) -> Iterator[int]:
        """Run block ``name`` on every window; yields after each. Then what it gave replaces it.

        Raises OutOfTurnError where the model does not get to the block.
        """
        block = self._model.get_submodule(name)
        stack = name.rpartition(".")[0]
        outputs = self._outputs.setdefault(stack, [None] * self._count)
        with resident(block):
            for window in range(self._count):
                self._window = window
                outputs[window] = _kept(self._output(block), outputs[0] if window else None)
                yield window
        self._replaced.append((block, block.__dict__.get("forward")))
        block.forward = lambda *args, **kwargs: _fresh(outputs[self._window])

    def _output(self, block: nn.Module) -> Any:
        given: list[Any] = []

        def stop(module: nn.Module, args: object, output: Any) -> None:
            given.append(output)
            raise _Stop

        handle = block.register_forward_hook(stop)
        try:
            self._run(self._window)
        except _Stop:
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
class _Kept:
    """A tensor on the CPU, and where it was."""

    tensor: torch.Tensor
    device: torch.device


def _kept(value: Any, twin: Any) -> Any:
    """``value`` with its tensors moved to the CPU; tensors that equal those of ``twin``, which is
    the same of another window, are kept once."""
    if isinstance(value, torch.Tensor):
        host = value.detach().cpu()
        if isinstance(twin, _Kept) and torch.equal(host, twin.tensor):
            host = twin.tensor
        return _Kept(host, value.device)
    if type(value) in (tuple, list):
        twins = twin if isinstance(twin, (tuple, list)) else [None] * len(value)
        return type(value)(_kept(*pair) for pair in zip(value, twins))
    return value


def _fresh(value: Any) -> Any:
    """What :func:`_kept` kept, as the block returned it: copies, as callers may write to it."""
    if isinstance(value, _Kept):
        return value.tensor.to(value.device, copy=True)
    if type(value) in (tuple, list):
        return type(value)(_fresh(item) for item in value)
    return value


@contextmanager
def _watched(
    model: nn.Module, names: Sequence[str], saw: Callable[[str, torch.Tensor], object]
) -> Iterator[None]:
    """Call ``saw`` with the name and a sample of the input of each of these blocks."""
    handles = []
    for name in names:

        def watch(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            saw(name, _sample([*args, *kwargs.values()]))

        block = model.get_submodule(name)
        handles.append(block.register_forward_pre_hook(watch, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sample(values: Sequence[object]) -> torch.Tensor:
    """Some values of the first floating-point tensor."""
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            flat = value.detach().reshape(-1)
            return flat[:: max(1, len(flat) // _SAMPLE)].cpu().double()
    return torch.zeros(1, dtype=torch.float64)


def _alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    spread = float(expected.std(correction=0)) or 1.0
    return float((found - expected).abs().max()) <= _TOLERANCE * spread


def _children(model: nn.Module, stack: str) -> Iterator[tuple[str, nn.Module]]:
    return model.get_submodule(stack).named_children()


def stacks_of(model: nn.Module, modules: Collection[str]) -> list[str]:
    """The lists of blocks that ``modules`` lie in. Raises UnsupportedInputError for a module that
    lies in none."""
    stacks = []
    for module in modules:
        block = block_of(model, module)
        if block is None:
            raise UnsupportedInputError(
                f"{type(model).__name__} has no list of blocks around {module}",
                hint="measure its inputs in a loop of your own: loftq_cli.Moments",
            )
        stacks.append(block.rpartition(".")[0])
    return list(dict.fromkeys(stacks))
