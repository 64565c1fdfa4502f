"""Matrices of a model in training: their weights in the model, and steps by the gradients there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loftq_cli.families.kinds import turned
from loftq_cli.layouts.base import Matrix
from loftq_cli.numerics.latent import Fixed
from loftq_cli.numerics.metrics import squared_norm

WARM = 0.05
"""The share of the steps in which the rates rise; then they fall along a cosine."""
LEAST = 0.02
"""The share of its rate that a parameter is trained with at least."""
SHORTER = 0.25
"""The share of the rates that is gone on with, where steps went too far."""
_BETAS = (0.9, 0.95)
_EPS = 1e-12  # of gradients that may be small: a step is as long as its rate, whatever the loss


@dataclass(frozen=True)
class Rates:
    """How far a step goes: for A and B, in parts of their root mean square; for the logarithms of
    scales; and for codes, in steps of the code. 0: they stay."""

    pair: float
    scales: float
    codes: float

    def of(self, name: str) -> float:
        """The rate of a parameter of a matrix."""
        return {"scales": self.scales, "codes": self.codes}.get(name, self.pair)


@dataclass
class Placed:
    """A matrix and the parameter of the model that is its weight, stored as ``matrix`` says.
    ``gradient``: the sum of the parameter's since it was last given up, float32."""

    matrix: Matrix
    latent: Fixed
    parameter: nn.Parameter
    gradient: torch.Tensor | None = None

    def take(self, parameter: torch.Tensor) -> None:
        """Add the gradient of the parameter, which gives it up: sums are float32, whatever dtype
        the model is in."""
        found, parameter.grad = parameter.grad, None
        if found is not None:
            self.add(found)

    def add(self, gradient: torch.Tensor) -> None:
        """Add to the gradient."""
        if self.gradient is None:
            self.gradient = gradient.float()
        else:
            self.gradient.add_(gradient)

    def give_up(self) -> torch.Tensor | None:
        """The gradient, None if the loss does not depend on the matrix; its sum begins anew."""
        found, self.gradient = self.gradient, None
        return found

    @torch.no_grad()
    def put(self) -> None:
        """Give the model the weight as it is now."""
        self.parameter.copy_(turned(self.latent.weight(), self.matrix.kind))

    @torch.no_grad()
    def pull(self) -> dict[str, torch.Tensor]:
        """The gradients of the latent's parameters; that of the weight is given up. A matrix that
        the loss does not depend on has none."""
        gradient = self.give_up()
        if gradient is None:
            return {}
        return self.latent.pull(turned(gradient, self.matrix.kind).contiguous())


Snapshot = Sequence[Mapping[str, torch.Tensor]]
"""The parameters of every matrix."""


class Trainer:
    """Trains ``placed`` for so many ``steps``. In the context their parameters in the model ask for
    gradients."""

    def __init__(self, placed: Sequence[Placed], rates: Rates, steps: int) -> None:
        self._placed, self._steps = placed, steps
        self._done, self._part = 0, 1.0
        self._named = [
            (item, name, tensor)
            for item in placed
            for name, tensor in item.latent.parameters.items()
            if rates.of(name) > 0
        ]
        self._lengths = [rates.of(name) * _unit(item.latent, name) for item, name, _ in self._named]
        groups = [{"params": [tensor]} for _, _, tensor in self._named]
        self._optimizer = torch.optim.Adam(groups, betas=_BETAS, eps=_EPS, fused=True)
        self._hooks: list[Any] = []

    def __enter__(self) -> Trainer:
        for item in self._placed:
            item.parameter.requires_grad_(True)
            hook = item.parameter.register_post_accumulate_grad_hook(item.take)  # type: ignore[no-untyped-call]
            self._hooks.append(hook)
            item.put()
        return self

    def __exit__(self, *raised: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for item in self._placed:
            item.parameter.requires_grad_(False)
            item.parameter.grad = item.gradient = None

    @torch.no_grad()
    def step(self) -> None:
        """One step by the gradients that the model has, which are given up."""
        share = self._part * schedule(self._done, self._steps)
        self._done += 1
        grads = {id(item): item.pull() for item in self._placed}
        for group, length, (item, name, tensor) in zip(
            self._optimizer.param_groups, self._lengths, self._named, strict=True
        ):
            group["lr"] = length * share
            tensor.grad = grads[id(item)].pop(name, None)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for item in self._placed:
            item.latent.settle()
            item.put()

    def snapshot(self) -> Snapshot:
        """The parameters as they are now."""
        return [
            {name: tensor.clone() for name, tensor in item.latent.parameters.items()}
            for item in self._placed
        ]

    def back_to(self, snapshot: Snapshot) -> None:
        """Go on from what the parameters were, in shorter steps."""
        self.restore(snapshot)
        self._optimizer.state.clear()  # gradients of where the steps led
        self._part *= SHORTER

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Set the parameters to what they were."""
        for item, held in zip(self._placed, snapshot, strict=True):
            for name, tensor in held.items():
                item.latent.parameters[name].copy_(tensor)
            item.put()


def _unit(latent: Fixed, name: str) -> float:
    """What the rate of a parameter is a part of. A and B are the smaller the nearer Q is, and small
    in wide matrices; one that begins at zero takes what the other has."""
    if name not in ("A", "B"):
        return 1.0
    own, other = (_mean_size(latent.parameters[each]) for each in (name, "AB".replace(name, "")))
    return own or other


def _mean_size(tensor: torch.Tensor) -> float:
    """The root mean square of a matrix."""
    return math.sqrt(squared_norm(tensor) / tensor.numel())


def schedule(step: int, steps: int) -> float:
    """The share of a rate at ``step`` of ``steps``: up at first, then down along a cosine."""
    warm = max(1.0, WARM * steps)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return max(min((step + 1) / warm, 1.0) * cosine, LEAST)
