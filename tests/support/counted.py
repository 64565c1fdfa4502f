"""What a step of training takes, counted while it is done: real tensors on a CPU, through load()
and PEFT, and torch's allocator as its own profiler saw it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import loftq_cli
from loftq_cli.loading.step import checkpoint_activations


@dataclass(frozen=True)
class Counted:
    """Bytes: of tensors that stay, ``saved`` for the backward, and at most in a ``step``."""

    weights: int
    adapter: int
    optimizer: int
    saved: int
    step: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.optimizer + self.step


def counted(out: Path, batch: int, length: int, *, checkpointing: bool, dtype: str) -> Counted:
    """The second step of AdamW on the conversion ``out``, of ``batch`` windows of ``length``
    tokens; with autocast if ``dtype`` is bfloat16."""
    model = loftq_cli.load(out, dtype=getattr(torch, dtype)).train()
    if checkpointing:
        checkpoint_activations(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    ids = torch.randint(0, 64, (batch, length))
    saved: dict[int, int] = {}

    def step(keep: Any = None) -> None:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep or _same, _same),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
        ):
            loss = _loss(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    known = {id_of(each) for each in (*model.parameters(), *model.buffers())}
    held: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)  # so that no other storage gets its place
        if id_of(tensor) not in known:
            saved[id_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    step(keep)
    held.clear()
    adapter = _bytes(trained)
    states = (each for state in optimizer.state.values() for each in state.values())
    moments = _bytes(each for each in states if isinstance(each, torch.Tensor))
    weights = _bytes([*model.parameters(), *model.buffers()]) - adapter
    weights += sum(_of_bitsandbytes(parameter) for parameter in model.parameters())
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's own, about cycles of it
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            step()
    return Counted(weights, adapter, moments, sum(saved.values()), _peak(seen))


def _loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    name = type(model.get_base_model()).__name__
    if name.endswith("Model"):
        found = model(input_ids=ids)[0].float().mean()
    else:
        found = model(input_ids=ids, labels=ids)["loss"]
    loss: torch.Tensor = found
    return loss


def _peak(seen: Any) -> int:
    events = [each for each in seen.profiler.kineto_results.events() if each.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def id_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {id_of(each): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def _of_bitsandbytes(parameter: Any) -> int:
    """What it keeps beside the codes, which are the parameter."""
    state = getattr(parameter, "quant_state", None)
    return 0 if state is None else state.absmax.nbytes + state.code.nbytes
