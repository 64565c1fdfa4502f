"""Experts that stay packed in memory, in the place of a family's own module of fused experts.

transformers holds the experts of a layer as two parameters, (experts, 2 inner, hidden) and
(experts, hidden, inner), and PEFT adapts such a parameter by a wrapper around the module, which
puts W + B A in its place for the time of a forward. Here every expert has packed layers of its own,
under the names that a checkpoint has (``experts.3.gate_proj``); in the place of each parameter is a
stand-in of its shape, dtype and device that takes no memory; and a wrapper hands A and B to the
module, which applies them to the tokens of each expert that is hit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from loftq_cli.errors import UnsupportedInputError
from loftq_cli.families.experts import FUSED, Form, form_of
from loftq_cli.loading.packed_weight import is_described


def chosen(
    top_k_index: torch.Tensor, count: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Each of ``count`` experts that ``top_k_index`` (tokens, k) names, the tokens that it gets,
    and which of their k choices it is. If the tensor has no values, all get as many."""
    if is_described(top_k_index):
        total = top_k_index.numel()
        most = -(-total // count)
        for expert in range(-(-total // most)):
            some = torch.empty(min(most, total - expert * most), dtype=torch.long)
            yield expert, some, some
        return
    for expert in sorted(set(top_k_index.flatten().tolist())):
        if 0 <= expert < count:  # what is masked out has a number beyond
            tokens, places = torch.where(top_k_index == expert)
            yield expert, tokens, places


Project = Callable[[str, torch.Tensor, int], torch.Tensor]
"""What the fused parameter of this name makes of one expert's inputs (tokens, in)."""


def computed(
    experts: Any, form: Form, project: Project, inputs: torch.Tensor, expert: int
) -> torch.Tensor:
    """The output of one of ``experts`` for its ``inputs``, both (tokens, hidden)."""
    first, last = form.parameters
    inner = activated(experts, project(first, inputs, expert), gated=form.gated)
    return project(last, inner, expert)


def mixed(
    count: int,
    output_of: Callable[[torch.Tensor, int], torch.Tensor],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor | None = None,
    top_k_weights: torch.Tensor | None = None,
    **named: torch.Tensor,
) -> torch.Tensor:
    """What a module of ``count`` experts gives: the sum of the chosen ones' outputs, (tokens,
    hidden). ``output_of`` makes them of the inputs (tokens, hidden) of one expert. The rest is
    what the module is given: hidden_states (tokens, hidden), top_k_index and top_k_weights
    (tokens, k), which gpt-oss calls otherwise."""
    top_k_index = named.get("router_indices", top_k_index)
    top_k_weights = named.get("routing_weights", top_k_weights)
    assert top_k_index is not None
    assert top_k_weights is not None
    result = torch.zeros_like(hidden_states)
    for expert, tokens, places in chosen(top_k_index, count):
        outputs = output_of(hidden_states[tokens], expert)
        weighted = outputs * top_k_weights[tokens, places, None]
        result.index_add_(0, tokens, weighted.to(result.dtype))
    return result


def activated(experts: Any, first: torch.Tensor, *, gated: bool) -> torch.Tensor:
    """What the module ``experts`` makes of ``first``, the output of its first parameter, before the
    down: act(gate) * up of (tokens, 2 inner) if it is ``gated``, else act(up); (tokens, inner)."""
    if gated and hasattr(experts, "_apply_gate"):
        found: torch.Tensor = experts._apply_gate(first)
        return found
    if not gated:
        alone: torch.Tensor = experts.act_fn(first)
        return alone
    gate, up = first.chunk(2, dim=-1)
    product: torch.Tensor = experts.act_fn(gate) * up
    return product


@dataclass(frozen=True)
class Factors:
    """``lora_A`` (experts, r, in), ``lora_B`` (experts, out, r) of one adapter, to be applied as
    ``scaling * B A``."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float

    def add(self, output: torch.Tensor, input: torch.Tensor, expert: int) -> torch.Tensor:
        """``output`` (tokens, out) plus what this adapter makes of ``input`` (tokens, in)."""
        lora_A, lora_B = self.lora_A[expert].to(input.dtype), self.lora_B[expert].to(input.dtype)
        return output + functional.linear(functional.linear(input, lora_A), lora_B) * self.scaling


class PackedExperts(nn.Module):
    """What goes in front of a family's class of experts (see :func:`take_over`)."""

    _form: Form
    _stand_ins: dict[str, tuple[tuple[int, ...], torch.dtype]]
    _parts: dict[str, tuple[str, ...]]
    _factors: dict[str, Sequence[Factors]]

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """What :func:`mixed` makes of its arguments; or if the form is batched, hidden states
        (experts * tokens, hidden) and nothing else: each one's outputs."""
        if self._form.batched:
            return self._batched(*args, **kwargs)
        return mixed(self._form.count, self._output, *args, **kwargs)

    def _batched(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Tokens that an expert was not chosen for are zero for it, and stay so."""
        by_expert = hidden_states.view(self._form.count, -1, hidden_states.shape[-1])
        outputs = []
        for expert, inputs in enumerate(by_expert):
            tokens = inputs.detach().any(dim=-1).nonzero()[:, 0]
            output = torch.zeros_like(inputs)
            if len(tokens):
                own = self._output(inputs[tokens], expert).to(output.dtype)
                output = output.index_add(0, tokens, own)
            outputs.append(output)
        return torch.cat(outputs)

    def _output(self, inputs: torch.Tensor, expert: int) -> torch.Tensor:
        """Of one expert, (tokens, hidden)."""
        return computed(self, self._form, self._project, inputs, expert)

    def _project(self, name: str, inputs: torch.Tensor, expert: int) -> torch.Tensor:
        """What the fused parameter ``name`` and its adapters make of ``inputs`` (tokens, in)."""
        layers: Any = getattr(self, str(expert))
        outputs = [getattr(layers, part)(inputs) for part in self._parts[name]]
        output = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
        for factors in self._factors.get(name, ()):
            output = factors.add(output, inputs, expert)
        if self._form.biased:
            output = output + self.get_parameter(f"{name}_bias")[expert].to(output.dtype)
        return output

    def put_stand_ins(self) -> None:
        """Put in the place of each parameter one of its shape that takes no memory."""
        for name in self._stand_ins:
            self._parameters[name] = self._stand_in(name)

    def _stand_in(self, name: str) -> nn.Parameter:
        shape, dtype = self._stand_ins[name]
        one = torch.zeros((), dtype=dtype, device=next(self.buffers()).device)
        return nn.Parameter(one.expand(shape), requires_grad=False)

    def __getattr__(self, name: str) -> Any:
        # While transformers loads the model there are no stand-ins, which the checkpoint would
        # have to hold; but code that draws the weights that it lacks may look at them.
        if name in self.__dict__.get("_stand_ins", ()) and name not in self._parameters:
            drawn: Any = self._stand_in(name)
            drawn._is_hf_initialized = True
            return drawn
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # What a stand-in is moved to would be as large as it says.
        held = [name for name in self._stand_ins if name in self._parameters]
        for name in held:
            shape, dtype = self._stand_ins[name]
            self._stand_ins[name] = (shape, fn(torch.zeros(1, dtype=dtype)).dtype)
            del self._parameters[name]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if held:
            self.put_stand_ins()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._stand_ins:
            destination.pop(f"{prefix}{name}", None)


def take_over(
    experts: nn.Module, formats: Mapping[str, Callable[[nn.Linear], nn.Module]]
) -> dict[str, nn.Module]:
    """Make ``experts``, of a family's class, packed: ``formats`` maps the name of each expert's
    layer in it (``3.gate_proj``) to what makes a packed layer of a linear one on the meta device.
    The packed layers by name. Raises UnsupportedInputError if this is no module of fused experts as
    they are known, or if layers are missing."""
    form = form_of(experts)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    parts: dict[str, tuple[str, ...]] = {}
    for name in form.parameters if form is not None else ("down_proj",):
        found = [each for each in FUSED[name] if f"0.{each[0]}" in formats]
        if not found or form is None:
            raise UnsupportedInputError(
                f"{type(experts).__name__} does not hold its experts as they are converted",
                hint="convert without them: --exclude '*.experts.*'",
            )
        shapes[name] = (form.parameters[name], experts.get_parameter(name).dtype)
        parts[name] = found[0]
    assert form is not None
    wanted = {f"{e}.{leaf}" for e in range(form.count) for each in parts.values() for leaf in each}
    if wanted != formats.keys():
        lacking = sorted(wanted ^ formats.keys())[0]
        raise UnsupportedInputError(
            f"{type(experts).__name__} has {form.count} experts, the checkpoint differs in "
            f"{lacking}",
            hint="convert the model again",
        )
    held: Any = experts
    held.__class__ = _subclass(type(experts))
    held._form, held._stand_ins, held._parts, held._factors = form, shapes, parts, {}
    held.is_transposed = form.transposed  # PEFT asks, and not every family says
    held._is_hf_initialized = True  # there is no weight to draw
    made = {}
    for name, (shape, dtype) in shapes.items():
        del experts._parameters[name]
        sides = (shape[2], shape[1]) if form.transposed else shape[1:]
        rows, columns = sides[0] // len(parts[name]), sides[1]
        for expert in range(form.count):
            if str(expert) not in experts._modules:
                experts.add_module(str(expert), nn.Module())
            for leaf in parts[name]:
                linear = nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype)
                layer = formats[f"{expert}.{leaf}"](linear)
                experts.get_submodule(str(expert)).add_module(leaf, layer)
                made[f"{expert}.{leaf}"] = layer
    return made


_SUBCLASSES: dict[type, type] = {}


def _subclass(own: type) -> type:
    """A packed class for a family's ``own``, one for all its modules."""
    if own not in _SUBCLASSES:
        _SUBCLASSES[own] = type(f"Packed{own.__name__}", (PackedExperts, own), {})
    return _SUBCLASSES[own]


def hand_over(wrapper: Any) -> None:
    """Have PEFT's ``wrapper`` of a stand-in hand its adapters to the experts, instead of putting
    W + B A in its place."""
    wrapper._activate_lora = functools.partial(_lent, wrapper)


@contextmanager
def _lent(wrapper: Any, active_adapters: Sequence[str]) -> Iterator[None]:
    experts, name = wrapper.get_base_layer(), wrapper.parameter_name
    found = [_factors(wrapper, each) for each in active_adapters if each in wrapper.lora_A]
    experts._factors = {**experts._factors, name: found}
    try:
        yield
    finally:
        experts._factors = {key: held for key, held in experts._factors.items() if key != name}


def _factors(wrapper: Any, adapter: str) -> Factors:
    """PEFT stores A as (experts * r, in), and B as (out, r * experts), the expert last."""
    lora_A, lora_B = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    count = wrapper.num_experts
    return Factors(
        lora_A.view(count, -1, lora_A.shape[1]),
        lora_B.view(len(lora_B), -1, count).permute(2, 0, 1),
        wrapper.scaling[adapter],
    )
