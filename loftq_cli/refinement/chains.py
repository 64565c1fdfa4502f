"""A model's blocks, run one after the other in two chains: the original's, and the refined one's.

As in :mod:`loftq_cli.calibration.blockwise` the model's own code does everything between the
blocks. What the last finished block gave for every window is kept for each chain, and takes its
place whenever the model is called for the next one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loftq_cli.calibration.blockwise import OutOfTurnError, Replacing, Run, Stop, kept
from loftq_cli.machine.durable import explained

ORIGINAL, REFINED = "original", "refined"
ACTIVATIONS = "activations"
"""The name that a file of activations has for a moment."""
Keep = Callable[[Any, Any], Any]
"""Keeps what a block gave for a window, given the same of window 0 or None."""


class Chains(Replacing):
    """``model``, which ``run`` calls with one of ``windows``, in two chains."""

    def __init__(
        self, model: nn.Module, run: Run, windows: Sequence[int], keep: Keep = kept
    ) -> None:
        super().__init__()
        self._model, self._run, self._windows, self._keep = model, run, windows, keep
        self._chain, self._window = ORIGINAL, 0
        # Of each stack's last finished block.
        self._outputs: dict[tuple[str, str], Mapping[int, Any]] = {}

    def given(self, name: str, chain: str, window: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model calls the block ``name`` with. Raises OutOfTurnError if it does not get
        there."""
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append((args, kwargs))
            raise Stop

        self._chain, self._window = chain, window
        block = self._model.get_submodule(name)
        handle = block.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._run(window)
        except Stop:
            return found[0]
        finally:
            handle.remove()
        raise OutOfTurnError

    @torch.no_grad()
    def outputs(self, name: str, chain: str) -> dict[int, Any]:
        """What the block ``name`` gives for every window, kept."""
        first, found = None, {}
        block = self._model.get_submodule(name)
        for window in self._windows:
            args, kwargs = self.given(name, chain, window)
            found[window] = self._keep(block(*args, **kwargs), first)
            first = found[window] if first is None else first
        return found

    def finish(self, name: str, outputs: Mapping[str, Mapping[int, Any]]) -> None:
        """From now on ``outputs``, by chain, take the place of the block ``name``."""
        stack = name.rpartition(".")[0]
        for chain, values in outputs.items():
            self._outputs[chain, stack] = values
        block = self._model.get_submodule(name)
        self.replace(block, lambda: self._outputs[self._chain, stack][self._window])


def spilling(folder: Path) -> Keep:
    """Keeps what a block gave in files of ``folder`` (see :func:`on_disk`)."""
    hold = on_disk(folder)
    return lambda value, twin: kept(value, twin, hold)


def on_disk(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Holds tensors in files of ``folder`` that have no name any more, so that they are gone with
    the process, however it ends. Raises EnvironmentFailure if the disk is full."""

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        nbytes = tensor.numel() * tensor.itemsize
        if not nbytes:
            return tensor
        file = folder / ACTIVATIONS
        with explained(file):
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                os.posix_fallocate(descriptor, 0, nbytes)  # a write to a map has no error to raise
            finally:
                os.close(descriptor)
            held = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype)
            file.unlink()
        return held.view(tensor.shape).copy_(tensor)

    return hold


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """No gradient for any parameter of ``model`` but those that somebody asks one for."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
