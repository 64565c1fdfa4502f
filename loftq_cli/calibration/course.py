"""Where a model calls its layers, and which of its blocks can be run one after the other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loftq_cli.calibration.blockwise import BlockRunner, Run

_SAMPLE = 4096  # values by which an input is known again
_TOLERANCE = 0.01  # of their standard deviation


@dataclass(frozen=True)
class Course:
    """``blocks``: what can be run one after the other, in the order in which the model calls it,
    each with the layers that are called there and nowhere else; ``others``: the layers that are
    called in another way. Layers that are never called are in neither."""

    blocks: Mapping[str, Sequence[str]]
    others: Sequence[str]


def course_of(model: nn.Module, run: Run, layers: Mapping[str, str]) -> Course:
    """Where ``model`` calls ``layers``, names to modules of it.

    Calls the model on window 0, twice: as it is, and block by block. There are no blocks if one
    is called twice, or if a block or a layer in it gets another input than in the model as it
    is.
    """
    calls = _Calls()
    around = (block_of(model, module) for module in layers.values())
    stacks = dict.fromkeys(block.rpartition(".")[0] for block in around if block is not None)
    names = [f"{stack}.{name}" for stack in stacks for name, _ in _children(model, stack)]
    with calls.watched(model, names, layers):
        run(0)
    blocks: dict[str, list[str]] = {block: [] for block in calls.order}
    others: list[str] = []
    for layer, (place, *more) in calls.places.items():
        in_one_block = place is not None and set(more) <= {place}
        (blocks[str(place)] if in_one_block else others).append(layer)
    if len(blocks) == len(calls.order) and _in_turn(model, run, layers, blocks, calls):
        return Course(blocks, others)
    return Course({}, list(calls.places))


def block_of(model: nn.Module, module: str) -> str | None:
    """The block that ``module`` lies in: the member of the outermost list of modules around it, or
    of a list in that list. A member that is ``module`` itself is none."""
    parent, listed = model, False
    parts = module.split(".")
    for depth, part in enumerate(parts):
        if listed and not isinstance(parent, nn.ModuleList):
            return ".".join(parts[:depth])
        listed = isinstance(parent, nn.ModuleList)
        parent = parent.get_submodule(part)
    return None


class _Calls:
    """The calls of blocks and layers: ``order`` of the blocks, the blocks that layers were called
    in (``places``, None outside of all), and samples of what each was given."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.places: dict[str, list[str | None]] = {}
        self.given: dict[str, list[torch.Tensor]] = {}
        self._now: str | None = None

    @contextmanager
    def watched(
        self, model: nn.Module, blocks: Collection[str], layers: Mapping[str, str]
    ) -> Iterator[None]:
        """Note the calls of these blocks and layers of ``model``."""
        handles = []
        try:
            for name in blocks:
                block = model.get_submodule(name)
                hook = self._hook(name, self._enter)
                handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
                handles.append(block.register_forward_hook(self._leave))
            for name, module in layers.items():
                hook = self._hook(name, self._call)
                layer = model.get_submodule(module)
                handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, note: Any) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            note(name)
            self.given.setdefault(name, []).append(_sample([*args, *kwargs.values()]))

        return hook

    def _enter(self, block: str) -> None:
        self.order.append(block)
        self._now = block

    def _leave(self, *_: object) -> None:
        self._now = None

    def _call(self, layer: str) -> None:
        self.places.setdefault(layer, []).append(self._now)


def _in_turn(
    model: nn.Module,
    run: Run,
    layers: Mapping[str, str],
    blocks: Mapping[str, Collection[str]],
    calls: _Calls,
) -> bool:
    """Whether blocks and layers are given the same when they are run one after the other."""
    again = _Calls()
    with BlockRunner(model, run, [0]) as runner:
        for name, inside in blocks.items():
            try:
                with again.watched(model, [name], {layer: layers[layer] for layer in inside}):
                    for _ in runner.windows(name):
                        pass
            except (MemoryError, torch.OutOfMemoryError):
                raise
            # It ran as a whole: what it misses now is what an earlier block did on the side.
            except Exception:
                return False
    return all(
        len(found) == len(calls.given[name]) and all(map(_alike, found, calls.given[name]))
        for name, found in again.given.items()
    )


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
