"""The inputs of the experts of a layer while a model runs, of the tokens that were sent to each.

transformers keeps the experts of a layer in one module, which is watched as a whole: what it is
given are the inputs of all gates and ups, and what their weights make of those the inputs of the
downs, which are computed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from loftq_cli.calibration.expert_outputs import project
from loftq_cli.errors import NonFiniteActivationError
from loftq_cli.families.experts import FUSED, form_of
from loftq_cli.loading.experts import activated, chosen
from loftq_cli.machine.world import World
from loftq_cli.numerics.moments import Moments

FEW = 32
"""Tokens, below which an expert has no moments of its own."""

_DOWN = tuple(leaf for each in FUSED["down_proj"] for leaf in each)


class ExpertInputs:
    """The moments of the inputs of ``experts``: of each module of experts in a model, the weight
    tensors by what follows its name (``3.gate_proj``).

    With ``full`` moments all gates and ups of a layer share those of all tokens that it sent to
    experts, as theirs would be a matrix for each; diagonal ones are each expert's own, and the
    layer's for experts that got few tokens. Inputs of downs are each expert's own; experts with
    few have none.
    """

    def __init__(self, experts: Mapping[str, Mapping[str, str]], *, full: bool) -> None:
        self._experts, self._full = experts, full
        self._given: dict[str, dict[int, Moments]] = {name: {} for name in experts}
        self._inner: dict[str, dict[int, Moments]] = {name: {} for name in experts}

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[None]:
        """Count what the modules are given."""
        handles = []
        for name in self._experts:

            def see(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
                hidden, index = [*args, *kwargs.values()][:2]
                self._see(name, module, hidden.detach(), index)

            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(see, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def gather(self, world: World, device: torch.device) -> None:
        """Have the inputs of all processes, each of which has seen its own windows on ``device``:
        an expert may have got tokens in some of them only."""
        for held in (*self._given.values(), *self._inner.values()):
            widths: dict[int, int] = {}
            for each in world.gathered([(key, one.in_features) for key, one in held.items()]):
                widths.update(each)
            for key in sorted(widths):
                moments = held.setdefault(key, Moments(widths[key], full=self._full))
                moments.added_up(world.add_up, device)

    def groups(self) -> Iterator[tuple[list[str], Moments]]:
        """Weight tensors that share an input, and its moments."""
        for name, parts in self._experts.items():
            if not self._given[name]:
                continue  # never called
            ups: dict[int, list[str]] = {}
            for part, weight in parts.items():
                number, _, leaf = part.partition(".")
                if leaf in _DOWN:
                    moments = self._inner[name].get(int(number))
                    if moments is not None and moments.tokens >= FEW:
                        yield [weight], moments
                else:
                    ups.setdefault(int(number), []).append(weight)
            yield from self._of_inputs(self._given[name], ups)

    def _of_inputs(
        self, given: Mapping[int, Moments], ups: Mapping[int, list[str]]
    ) -> Iterator[tuple[list[str], Moments]]:
        if self._full:
            (moments,) = given.values()
            yield sorted(weight for weights in ups.values() for weight in weights), moments
            return
        shared: list[str] = []
        for number, weights in ups.items():
            if number in given and given[number].tokens >= FEW:
                yield sorted(weights), given[number]
            else:
                shared += weights
        if shared:
            yield sorted(shared), Moments.together(list(given.values()))

    @torch.no_grad()
    def _see(self, name: str, module: Any, hidden: torch.Tensor, index: torch.Tensor) -> None:
        form = form_of(module)
        assert form is not None  # others are not watched
        first = next(iter(form.parameters))
        for expert, tokens, _ in chosen(index, form.count):
            rows = hidden[tokens]
            outputs = project(module, form, first, rows, expert)
            gated = activated(module, outputs, gated=form.gated)
            whose = 0 if self._full else expert
            self._add(name, self._given[name], whose, rows)
            self._add(name, self._inner[name], expert, gated)

    def _add(self, name: str, held: dict[int, Moments], key: int, rows: torch.Tensor) -> None:
        if key not in held:
            held[key] = Moments(rows.shape[1], full=self._full)
        try:
            held[key].add(rows)
        except NonFiniteActivationError as error:
            raise NonFiniteActivationError(f"{name}: {error.message}") from None
