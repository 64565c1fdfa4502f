"""How much an error of each matrix is worth to the model: one backward pass over some windows.

The tokens that the model is asked for are drawn from what it predicts itself, so that the mean
square of the gradients is the Fisher information, the second derivative of the divergence of the
model from what it was (Martens, "New insights and perspectives on the natural gradient method",
JMLR 2020, section 5). An error E of a matrix then costs, to second order and per token,

    KL = 1/2 E[(g^T E x)^2],

g the gradient of the summed loss at the layer's output, x its input. For errors that know nothing
of g this is half of ``s`` times ||E||_H^2, with the sensitivity

    s = E[|g|^2 |x|^2] / (out * E[|x|^2]),

the mean square of an output's gradient, tokens weighted by the energy of their input. Where a layer
is given some of the tokens only, as experts are, it counts for their share. Tokens are
taken one by one: what the same error does to all of them together is left out. The weights matter:
tokens that a model parks its attention on have inputs of a thousand times the energy, and
outputs that nothing depends on.

A model that predicts nothing is taken to give its last hidden states with normal errors, relative
to their length.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from loftq_cli.calibration.course import block_of
from loftq_cli.calibration.expert_inputs import FEW
from loftq_cli.calibration.expert_outputs import one_by_one
from loftq_cli.calibration.layer_inputs import first_of
from loftq_cli.calibration.measure import Calibration
from loftq_cli.calibration.outputs import called, checkpointed, predicts
from loftq_cli.errors import LoftqError, NonFiniteActivationError, UnsupportedInputError, listed
from loftq_cli.machine.observer import Observer

OPTION = "--sensitivity"
MOST_WINDOWS = 16
_SCALE = 256.0  # of the loss, so that gradients stay within float16
_DIGITS = 7


Asked = Literal["none", "possible", "needed"]
"""Whether sensitivities are measured; "possible": unless gradients do not go through the model."""


def measured(
    calibration: Calibration, asked: Asked, device: torch.device, observer: Observer
) -> dict[str, float]:
    """What :func:`measure` finds, if it is ``asked``, else nothing. Raises what that does, but
    UnsupportedInputError only if it is "needed"."""
    if asked == "none":
        return {}

    def advance(name: str) -> None:
        observer.working_on(name)
        observer.advance(1)

    observer.begin(windows_of(len(calibration.windows)), "measuring sensitivity", " windows")
    try:
        found = measure(calibration, device, advance)
    except UnsupportedInputError as error:
        if asked == "needed":
            raise
        observer.note(f"without sensitivities: {error.message}")
        return {}
    finally:
        observer.end()
    missing = [name for name in calibration.widths if name not in found]
    if missing:
        observer.note(
            f"no sensitivity was measured for {listed(missing, 1)}: the mean of the others counts"
        )
    return found


def windows_of(samples: int) -> int:
    """How many of so many windows the pass goes over."""
    return min(samples, MOST_WINDOWS)


def measure(
    calibration: Calibration, device: torch.device, advance: Callable[[str], None]
) -> dict[str, float]:
    """The sensitivity of every matrix by the name of its weight tensor, in nats per square of an
    output's unit. Those that text does not go through have none, nor has a module of experts that
    cannot be run one by one. Experts with few tokens share what those of their layer have for a
    token.

    Activations inside a block are computed again for its gradient: memory holds the inputs of all
    blocks and the activations of one, for one window. ``advance`` is called for each. Raises
    UnsupportedInputError if gradients do not go through the model, NonFiniteActivationError.
    """
    model = calibration.model
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    whole = predicts(model)
    call = called(model if whole else getattr(model, "base_model", model), device, OPTION)
    generator = torch.Generator().manual_seed(0)
    of_experts = (weights.values() for weights in calibration.experts.values())
    held = {name: _Sums() for name in itertools.chain(calibration.layers, *of_experts)}
    count = windows_of(len(calibration.windows))
    step = len(calibration.windows) // count
    modules = itertools.chain(calibration.layers.values(), calibration.experts)
    around = (block_of(model, module) for module in modules)
    blocks = [model.get_submodule(name) for name in dict.fromkeys(around) if name is not None]
    try:
        with checkpointed(blocks), _watched(calibration, held), torch.enable_grad():
            for window in calibration.windows[::step][:count]:
                output = call(window[None])[0].float()
                loss = _surprise(output, generator) if whole else _moved(output, generator)
                (loss * _SCALE).backward()  # type: ignore[no-untyped-call]
                advance("the gradients")
    except (LoftqError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any kind: it is the model's own code
        if "can't allocate memory" in str(error):
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedInputError(
            f"{calibration.directory}: no gradient goes through {type(model).__name__}: {said}",
            hint=f"leave out {OPTION}",
        ) from error
    for weights in calibration.experts.values():
        _share(weights, held)
    tokens = count * calibration.windows.shape[1]
    return {name: sums.value(name, tokens) for name, sums in held.items() if sums.energy}


@dataclass
class _Sums:
    """Over ``tokens``: ``energy`` |x|^2, ``product`` |g|^2 |x|^2 with the scaled loss' g."""

    tokens: int = 0
    energy: float = 0.0
    product: float = 0.0
    outputs: int = 1

    def add(self, inputs: torch.Tensor, grad: torch.Tensor) -> None:
        self.outputs = grad.shape[-1]
        energy = _squares(inputs)
        self.tokens += len(energy)
        self.energy += float(energy.sum())
        self.product += float((_squares(grad) * energy).sum())

    def value(self, name: str, tokens: int) -> float:
        """Of a text of so many tokens."""
        share = self.tokens / tokens
        found = share * self.product / (self.outputs * self.energy * _SCALE**2)
        if not math.isfinite(found):
            raise NonFiniteActivationError(f"{name}: its output's gradient is not finite")
        return float(f"{found:.{_DIGITS}g}")


def _share(weights: Mapping[str, str], held: dict[str, _Sums]) -> None:
    """Give the experts of a layer that got few tokens, none among them, what all have together for
    a token, and one token at least; ``weights`` are those of the layer."""
    leaves: dict[str, list[str]] = {}
    for part, name in weights.items():
        leaves.setdefault(part.partition(".")[2], []).append(name)
    for names in leaves.values():
        sums = [held[name] for name in names]
        energy = math.fsum(each.energy for each in sums)
        product = math.fsum(each.product for each in sums)
        outputs = max(each.outputs for each in sums)
        for name, own in zip(names, sums, strict=True):
            if own.tokens < FEW:
                held[name] = _Sums(max(own.tokens, 1), energy, product, outputs)


def _squares(rows: torch.Tensor) -> torch.Tensor:
    """|row|^2 of (…, width), float64 (rows,)."""
    return rows.reshape(-1, rows.shape[-1]).float().square().sum(dim=1).double()


class _Watch(torch.autograd.Function):
    """An identity that tells ``sums`` what gradient an output gets. The input is saved as autograd
    saves what it needs, so that it is not held where blocks are computed again. ``anchor`` has the
    output require a gradient, whatever is before it."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, inputs: torch.Tensor, anchor: torch.Tensor, sums: _Sums
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs)
        ctx.sums = sums
        return output.clone()  # the model may write to it in place

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inputs,) = ctx.saved_tensors
        ctx.sums.add(inputs, grad)
        return grad, None, None, None


@contextmanager
def _watched(calibration: Calibration, held: Mapping[str, _Sums]) -> Iterator[None]:
    """Add what the layers and experts of ``calibration`` are given and get back."""
    anchor = torch.zeros((), requires_grad=True)
    handles = []

    def watch(name: str, output: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        seen: torch.Tensor = _Watch.apply(output, inputs, anchor, held[name])  # type: ignore[no-untyped-call]
        return seen

    try:
        for name, module in calibration.layers.items():

            def see(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> Any:
                return watch(name, output, first_of(args, kwargs))

            layer = calibration.model.get_submodule(module)
            handles.append(layer.register_forward_hook(see, with_kwargs=True))
        with one_by_one(calibration.model, calibration.experts, watch):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _surprise(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The summed loss of tokens that float32 ``logits`` (length, vocabulary) themselves predict."""
    with torch.no_grad():
        likely = torch.softmax(logits, dim=-1).cpu()
        drawn = torch.multinomial(likely, 1, generator=generator)[:, 0].to(logits.device)
    return functional.cross_entropy(logits, drawn, reduction="sum")


def _moved(states: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What moves hidden ``states``, float32 (length, width), by their length in a random
    direction."""
    drawn = torch.randn(states.shape, generator=generator).to(states.device)
    with torch.no_grad():
        length = states.square().sum(dim=-1, keepdim=True).sqrt().clamp_min(1e-20)
    return (states / length * drawn).sum()
