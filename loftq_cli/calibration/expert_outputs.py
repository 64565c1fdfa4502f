"""Experts that lie in one module, run one after the other, so that the output of every matrix of
each can be watched while a model runs, and given a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from loftq_cli.calibration.outputs import replaced
from loftq_cli.families.experts import FUSED, Form, form_of
from loftq_cli.loading.experts import computed, mixed

Watch = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
"""Gives back the output (tokens, out) of a weight tensor, by its name, for inputs (tokens, in)."""


@contextmanager
def one_by_one(
    model: nn.Module, experts: Mapping[str, Mapping[str, str]], watch: Watch
) -> Iterator[None]:
    """Run the modules ``experts`` of ``model`` so; of each, the weight tensors by what follows its
    name (``3.gate_proj``)."""
    changes = []
    for name, weights in experts.items():
        module = model.get_submodule(name)
        # accelerate brings the weights, and then calls what it found here.
        own = "_old_forward" if hasattr(module, "_old_forward") else "forward"
        changes.append((module, own, _OneByOne(module, weights, watch)))
    with replaced(changes):
        yield


def project(
    module: nn.Module, form: Form, name: str, inputs: torch.Tensor, expert: int
) -> torch.Tensor:
    """What the parameter ``name`` of all experts, with its bias, makes of one's ``inputs``
    (tokens, in)."""
    weight = module.get_parameter(name)[expert]
    bias = module.get_parameter(f"{name}_bias")[expert] if form.biased else None
    return functional.linear(inputs, weight.T if form.transposed else weight, bias)


class _OneByOne:
    """In the place of the forward of a ``module`` of experts."""

    def __init__(self, module: nn.Module, weights: Mapping[str, str], watch: Watch) -> None:
        form = form_of(module)
        assert form is not None  # others are not watched
        self._module, self._form = module, form
        self._weights, self._watch = weights, watch

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return mixed(self._form.count, self._output, *args, **kwargs)

    def _output(self, inputs: torch.Tensor, expert: int) -> torch.Tensor:
        return computed(self._module, self._form, self._project, inputs, expert)

    def _project(self, name: str, inputs: torch.Tensor, expert: int) -> torch.Tensor:
        output = project(self._module, self._form, name, inputs, expert)
        parts = (tuple(f"{expert}.{leaf}" for leaf in leaves) for leaves in FUSED[name])
        found = next((each for each in parts if self._weights.keys() >= {*each}), ())
        if not found:
            return output
        watched = [
            self._watch(self._weights[part], piece, inputs)
            for part, piece in zip(found, output.chunk(len(found), dim=-1), strict=True)
        ]
        return torch.cat(watched, dim=-1)
