"""What a step of training takes beyond weights and optimizer, counted on tensors without memory.

A forward with its loss, and a backward, of transformers' and PEFT's own code; every tensor that
comes to be and that goes is followed. What kernels and allocators need for themselves is not.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from loftq_cli.families.skeleton import silence
from loftq_cli.layouts.base import Layout
from loftq_cli.loading.hollow import SAMPLED, Adapted, Kept, filled, hollow, stacks

_LABELLED = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")


@dataclass(frozen=True)
class Step:
    """A training step: ``batch`` windows of ``length`` tokens, the model in ``dtype``, which
    autocast computes in if it is one of 16 bits; with gradient checkpointing if
    ``checkpointing``."""

    batch: int
    length: int
    dtype: torch.dtype
    checkpointing: bool


_FORWARD, _BACKWARD, _FIRST_BLOCK = range(3)
"""The phases of a step: the last begins where the backward reaches the first block, and all other
gradients are there. In each of them the most is linear in the number of blocks."""


def step_bytes(skeleton: Any, adapted: Sequence[Adapted], layout: Layout, step: Step) -> int | str:
    """Bytes that ``step`` takes at most beyond weights, adapter and optimizer: activations, the
    loss, gradients, and weights while they are decoded. ``skeleton``: a model on the meta device.
    Or why that cannot be counted."""
    # Packages that PEFT imports greet on stdout.
    with silence(), redirect_stdout(StringIO()):
        try:
            return _of_all(skeleton, adapted, layout, step)
        except Exception as error:  # of any kind: the model's code is somebody else's
            line = (str(error).strip().splitlines() or [""])[0]
            return f"{type(skeleton).__name__}: {type(error).__name__}: {line[:160]}"


def _of_all(skeleton: Any, adapted: Sequence[Adapted], layout: Layout, step: Step) -> int:
    """From few blocks of each kind, and from what one of them adds."""
    found = stacks(skeleton)
    kept: dict[str, list[int]] = {stack.path: stack.first for stack in found}

    def counted(kept: Kept) -> list[int]:
        return _counted(hollow(skeleton, adapted, layout, step.dtype, kept), step)

    few = counted(kept)
    most = list(few)
    for stack in found:
        for kind in stack.kinds:
            if len(kind) > SAMPLED:
                left = [number for number in kept[stack.path] if number != kind[1]]
                less = counted({**kept, stack.path: left})
                for phase, nbytes in enumerate(few):
                    most[phase] += (len(kind) - SAMPLED) * (nbytes - less[phase])
    return max(most)


def checkpoint_activations(model: Any) -> None:
    """Have the blocks of ``model`` computed again for the gradient, whichever name transformers has
    for it."""
    name = "activation_checkpointing_enable"  # since 5.23
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.enable_input_require_grads()


def _counted(model: Any, step: Step) -> list[int]:
    """The most bytes in each phase."""
    mode = FakeTensorMode()
    filled(model, mode)
    if step.checkpointing:
        checkpoint_activations(model)
    live = _Live([*model.parameters(), *model.buffers()])
    narrow = step.dtype in (torch.bfloat16, torch.float16)
    autocast = torch.autocast("cpu", torch.bfloat16) if narrow else nullcontext()
    with mode, _first_block_watched(model, live):
        with live, autocast:
            loss = _loss(model, step)
        live.enter(_BACKWARD)
        with live:
            loss.backward()  # type: ignore[no-untyped-call]
    return live.most


def _loss(model: Any, step: Step) -> torch.Tensor:
    base = model.get_base_model()
    takes = inspect.signature(type(base).forward).parameters
    ids = torch.zeros((step.batch, step.length), dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids}
    labelled = type(base).__name__.endswith(_LABELLED) and "labels" in takes
    if labelled:
        inputs["labels"] = ids
    elif "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = ids
    found: Mapping[str, Any] = model(**inputs)
    if labelled:
        loss: torch.Tensor = found["loss"]
        return loss
    first = next(each for each in tree_iter(dict(found)) if isinstance(each, torch.Tensor))
    return first.float().mean()


@contextmanager
def _first_block_watched(model: nn.Module, live: _Live) -> Iterator[None]:
    """Have ``live`` told when the backward reaches the first block."""
    blocks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not blocks or not len(blocks[0]):
        yield
        return

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        first = next((each for each in tree_iter(output) if isinstance(each, torch.Tensor)), None)
        if first is not None and first.requires_grad:
            first.register_hook(lambda gradient: live.enter(_FIRST_BLOCK))  # type: ignore[no-untyped-call]

    handle = blocks[0][0].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of the storages that operations make and that go; those of ``known``
    tensors are no part of it. ``most``: the most in each phase."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = [0, 0, 0]
        self._now = 0
        self._phase = _FORWARD
        self._sizes: dict[int, int] = {}
        for tensor in known:
            self._see(tensor.untyped_storage(), 0)

    def enter(self, phase: int) -> None:
        """What comes now is of that phase."""
        self._phase = phase
        self._note()

    def _note(self) -> None:
        self.most[self._phase] = max(self.most[self._phase], self._now)

    def _see(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = nbytes
            self._now += nbytes
            self._note()
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._sizes.pop(key, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in tree_iter(found):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                self._see(storage, storage.nbytes())
        return found
