"""What it takes to load a conversion and to fine-tune it, from its plan: weights, adapter,
gradients, optimizer and what a step computes with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loftq_cli.checkpoint.dtypes import BITS, tag_named, torch_dtype
from loftq_cli.checkpoint.source import Source
from loftq_cli.errors import UsageError
from loftq_cli.families.experts import part_of
from loftq_cli.families.lengths import limits
from loftq_cli.families.skeleton import skeleton
from loftq_cli.layouts.fused import Member, fused_adapters
from loftq_cli.loading.hollow import Adapted
from loftq_cli.loading.step import Step, step_bytes
from loftq_cli.planning.plan import Plan

DTYPES = ("bfloat16", "float16", "float32")
_LENGTH = 2048
_FLOAT = 4  # bytes of a value of the adapter, which PEFT keeps in float32
_MOMENTS = 2  # of AdamW, for each value that is trained


@dataclass(frozen=True)
class Training:
    """How a model is trained: ``batch`` windows of ``length`` tokens at a time, None: up to 2048,
    loaded in ``dtype``."""

    length: int | None = None
    batch: int = 1
    dtype: str = "bfloat16"

    def settled(self, source: Source, names: Mapping[str, str]) -> Training:
        """With a length that the model takes. ``names``: the options that set the fields. Raises
        UsageError for other values."""
        longest = min(limits(source.config.content), default=None)
        if self.length is None:
            length = _LENGTH if longest is None else min(_LENGTH, longest)
            return replace(self, length=length).settled(source, names)
        for value, name in ((self.length, "length"), (self.batch, "batch")):
            if not 0 < value <= 1 << 24:
                raise UsageError(f"{names[name]} {value}: must be a whole number from 1")
        if longest is not None and self.length > longest:
            raise UsageError(
                f"{names['length']} {self.length}: the model takes at most {longest} tokens"
            )
        if self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype}: not one of {', '.join(DTYPES)}")
        return self


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes. ``weights``: everything but the adapter as it is loaded; ``adapter``, its
    ``gradients`` and its ``optimizer`` state, in float32; ``step``: what a step takes beyond
    weights, adapter and optimizer, at most, ``checkpointed``: with gradient checkpointing; None
    if that is not known or not there, and ``unknown`` says why."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    step: int | None
    checkpointed: int | None
    unknown: str | None = None

    @property
    def loaded(self) -> int:
        return self.weights + self.adapter

    @property
    def known(self) -> int:
        """All but activations."""
        return self.loaded + self.gradients + self.optimizer

    def training(self, step: int | None) -> int | None:
        """At most, with that step."""
        if step is None:
            return None
        return self.loaded + self.optimizer + max(step, self.gradients)

    @property
    def least(self) -> int | None:
        """Of training in the way that takes less."""
        ways = [found for each in (self.step, self.checkpointed) if (found := self.training(each))]
        return min(ways, default=None)


class Steps:
    """Counts the steps of plans for one source, each once: widths make no difference."""

    def __init__(self) -> None:
        self._found: dict[Any, int | str] = {}

    def count(self, plan: Plan, step: Step) -> int | str:
        """As :func:`loftq_cli.loading.step.step_bytes`."""
        adapted = [Adapted(item.matrix, item.rank) for item in plan.matrices.values()]
        layout = plan.layout
        ranks = tuple((item.matrix.name, item.rank) for item in adapted)
        key = layout.keeps_decoded, layout.holds_codes, ranks, step
        if key not in self._found:
            model = _model(plan)
            found = model if isinstance(model, str) else step_bytes(model, adapted, layout, step)
            self._found[key] = found
        return self._found[key]


def training_memory(plan: Plan, training: Training, steps: Steps) -> TrainingMemory:
    """What ``plan`` takes. ``training`` has a length."""
    dtype = torch_dtype(tag_named(training.dtype))
    assert training.length is not None
    values = _adapter_elements(plan)
    step, checkpointed = (
        steps.count(plan, Step(training.batch, training.length, dtype, checkpointing))
        for checkpointing in (False, True)
    )
    return TrainingMemory(
        weights=_weights(plan, dtype.itemsize * 8),
        adapter=values * _FLOAT,
        gradients=values * _FLOAT,
        optimizer=values * _FLOAT * _MOMENTS,
        step=None if isinstance(step, str) else step,
        checkpointed=None if isinstance(checkpointed, str) else checkpointed,
        unknown=step if isinstance(step, str) else None,
    )


def _weights(plan: Plan, bits: int) -> int:
    """Bytes of the backbone in a model whose dtype has so many ``bits``."""
    held = sum(plan.layout.loaded_bytes(item.matrix, bits) for item in plan.matrices.values())
    model = _model(plan)
    if isinstance(model, str):
        kept = (tensor for tensor, _ in plan.selection.kept)
        return held + sum(tensor.elements * min(bits, BITS[tensor.dtype]) // 8 for tensor in kept)
    replaced = sum(item.matrix.elements for item in plan.matrices.values())
    others: int = sum(each.numel() for each in model.parameters()) - replaced
    buffers: int = sum(each.nbytes for each in model.buffers())
    return held + others * bits // 8 + buffers


def _adapter_elements(plan: Plan) -> int:
    """Values of the adapter as PEFT holds it, which has one pair for all experts of a layer."""
    alone, members = [], []
    for item in plan.matrices.values():
        matrix = item.matrix
        if part_of(matrix.module) is None:
            alone += item.adapter_specs
            continue
        named = matrix if matrix.in_memory else replace(matrix, in_memory=matrix.module)
        members.append(Member(named, item.rank, item.adapter_dtype))
    specs = [*alone, *(spec for each in fused_adapters(members) for spec in each.specs())]
    return sum(spec.nbytes * 8 // BITS[spec.dtype] for spec in specs)


def _model(plan: Plan) -> Any:
    """The model on the meta device, or why there is none that these tensors are of."""
    model = skeleton(plan.source.config.content)
    if isinstance(model, str):
        return model
    weights = dict(model.named_parameters(remove_duplicate=False))
    for item in plan.matrices.values():
        matrix = item.matrix
        weight = weights.get(f"{matrix.adapted}.weight")
        if part_of(matrix.module) is None and (
            weight is None or tuple(weight.shape) != matrix.stored_shape
        ):
            return f"config.json describes another model than the tensors are of: {matrix.name}"
    return model
