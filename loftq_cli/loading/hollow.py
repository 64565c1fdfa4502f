"""A model as it is trained, of tensors without memory: what a training step takes is counted on it.

It is made of transformers' class for a config.json, our packed modules and PEFT's own adapter, and
has few of the blocks of a stack of like ones, which a step goes through alike.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from loftq_cli.families.classes import takes_text
from loftq_cli.families.experts import FUSED, part_of
from loftq_cli.families.modules import kind_of
from loftq_cli.families.names import places_of_experts
from loftq_cli.families.tasks import task_type
from loftq_cli.layouts import adapter
from loftq_cli.layouts.base import Layout, Matrix
from loftq_cli.loading import guard
from loftq_cli.loading.experts import take_over
from loftq_cli.loading.replacement import packed
from loftq_cli.machine.packages import required

SAMPLED = 3  # of like blocks: the first and the last of them differ
_BITS, _BLOCK = 4, 64  # of packed modules, whose size is not counted here


@dataclass(frozen=True)
class Adapted:
    """A matrix of the model, and the rank of its adapter."""

    matrix: Matrix
    rank: int


@dataclass(frozen=True)
class Stack:
    """``path`` of a list of blocks, and its blocks by what they are made of: the numbers of like
    ones together."""

    path: str
    kinds: Sequence[Sequence[int]]

    @property
    def first(self) -> list[int]:
        """Those that stand for all: the first few of each kind."""
        return sorted(number for kind in self.kinds for number in kind[:SAMPLED])


Kept = Mapping[str, Sequence[int]]
"""The numbers of the blocks that are left, by the path of their stack."""


def stacks(model: nn.Module) -> list[Stack]:
    """The stacks of ``model`` in which some blocks are alike. What lies in a block is no stack."""
    found: list[Stack] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{stack.path}.") for stack in found)
        if not isinstance(module, nn.ModuleList) or inside:
            continue
        kinds: dict[Any, list[int]] = {}
        for number, block in enumerate(module):
            kinds.setdefault(_made_of(block), []).append(number)
        stack = Stack(path, list(kinds.values()))
        if len(stack.first) < len(module):
            found.append(stack)
    return found


def _made_of(block: nn.Module) -> Any:
    tensors = tuple((name, tuple(each.shape)) for name, each in block.named_parameters())
    return type(block).__name__, tensors


def hollow(
    skeleton: Any, adapted: Iterable[Adapted], layout: Layout, dtype: torch.dtype, kept: Kept
) -> Any:
    """The PeftModel of ``skeleton``, a model on the meta device, that :func:`filled` takes: in
    ``dtype``, its matrices ``adapted`` as a module of ``layout`` holds them, its stacks cut down to
    the blocks in ``kept``. Raises EnvironmentFailure if peft is not installed, and whatever PEFT
    does."""
    peft = required("peft", "train", "counting what a training step takes")
    guard.install()
    places = _places(skeleton, list(adapted))
    model = _thinned(skeleton, kept).to(dtype)
    names = _Names(kept)
    ranks = {}
    for name, item in places.single.items():
        left = names(name)
        if left is None:
            continue
        ranks[left] = item.rank
        module = _stand_in(model.get_submodule(left), item.matrix, layout)
        model.set_submodule(left, module)
    parameters: dict[str, int] = {}
    for path, parts in places.experts.items():
        if (left := names(path)) is not None:
            parameters |= _put_experts(model, left, parts, layout)
    task = task_type([type(model).__name__], takes_text=takes_text(model))
    transposed = layout.keeps_conv1d and any(kind_of(m) == "conv1d" for m in model.modules())
    highest = max([*ranks.values(), 1])
    stated = adapter.config(
        ranks, highest, None, task, transposed=transposed, parameters=parameters
    )
    stated["inference_mode"] = False
    made = peft.get_peft_model(model, peft.LoraConfig(**stated), low_cpu_mem_usage=True)
    return made.train()


@dataclass(frozen=True)
class _Places:
    """Where the adapted matrices are in the model: modules of their own, and parts (``3.w1``) of
    modules of fused experts."""

    single: Mapping[str, Adapted]
    experts: Mapping[str, Mapping[str, Adapted]]


def _places(model: nn.Module, adapted: Sequence[Adapted]) -> _Places:
    by_name = {item.matrix.module: item for item in adapted}
    homes = places_of_experts(model, [name for name in by_name if part_of(name)])
    experts = {
        path: {part: by_name[name] for part, name in parts.items()} for path, parts in homes.items()
    }
    single = {item.matrix.adapted: item for name, item in by_name.items() if not part_of(name)}
    return _Places(single, experts)


class _Names:
    """What a module is called once its stack is cut down to ``kept``, None if it is gone."""

    def __init__(self, kept: Kept) -> None:
        self._numbers = {
            path: {old: new for new, old in enumerate(left)} for path, left in kept.items()
        }

    def __call__(self, name: str) -> str | None:
        for path, numbers in self._numbers.items():
            if name.startswith(f"{path}."):
                number, _, rest = name.removeprefix(f"{path}.").partition(".")
                new = numbers.get(int(number))
                return None if new is None else f"{path}.{new}.{rest}"
        return name


def _thinned(skeleton: nn.Module, kept: Kept) -> Any:
    """A copy of ``skeleton`` without the blocks that are not ``kept``, which are not copied."""
    memo: dict[int, Any] = {}
    for path, left in kept.items():
        blocks: Any = skeleton.get_submodule(path)
        copied = nn.ModuleList(copy.deepcopy(blocks[number], memo) for number in left)
        memo[id(blocks)] = copied
    return copy.deepcopy(skeleton, memo)


def _stand_in(module: Any, matrix: Matrix, layout: Layout) -> Any:
    """What computes and keeps as the module of ``layout`` does that holds ``matrix``."""
    if not layout.holds_codes:
        return module
    if layout.keeps_decoded:
        rows, columns = matrix.shape
        bias = module.bias is not None
        return _DecodedLinear(columns, rows, bias, device="meta", dtype=module.weight.dtype)
    return packed(module, _entry(matrix))


def _entry(matrix: Matrix) -> dict[str, Any]:
    kind = {} if matrix.kind == "linear" else {"kind": matrix.kind}
    return {"bits": _BITS, "block_size": _BLOCK, "decoding": "affine", **kind}


class _DecodedLinear(nn.Linear):
    """A linear layer that decodes its weight in the forward, and keeps it for the backward."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = input.new_empty(self.out_features, self.in_features)
        return functional.linear(input, weight, self.bias)


def _put_experts(
    model: nn.Module, path: str, parts: Mapping[str, Adapted], layout: Layout
) -> dict[str, int]:
    """Have the experts in ``path`` packed, if ``layout`` packs; the ranks of the adapters of their
    parameters, by name."""
    if layout.holds_codes:
        formats = {part: partial(packed, entry=_entry(item.matrix)) for part, item in parts.items()}
        take_over(model.get_submodule(path), formats)
    of_first = {
        part.partition(".")[2]: item.rank for part, item in parts.items() if part.startswith("0.")
    }
    ranks = {}
    for parameter, alternatives in FUSED.items():
        for leaves in alternatives:
            if of_first.keys() >= set(leaves):
                ranks[f"{path}.{parameter}"] = sum(of_first.pop(leaf) for leaf in leaves)
    return ranks


def filled(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put tensors of ``mode``, on the CPU, in the place of those on the meta device; the adapter's
    in float32, as PEFT has them. What is shared stays shared."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the first kept, so that ids stay
    with mode:
        for module in model.modules():
            held: Iterable[Any] = (module._parameters, module._buffers)
            for tensors in held:
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        made[id(tensor)] = tensor, _of_mode(tensor)
                    tensors[name] = made[id(tensor)][1]
            for name, value in vars(module).items():
                if isinstance(value, torch.Tensor):
                    setattr(module, name, _of_mode(value))


def _of_mode(tensor: torch.Tensor) -> torch.Tensor:
    trained = tensor.requires_grad
    dtype = torch.float32 if trained else tensor.dtype
    found = torch.empty(tensor.shape, dtype=dtype, device="cpu")
    return nn.Parameter(found, requires_grad=trained) if isinstance(tensor, nn.Parameter) else found
