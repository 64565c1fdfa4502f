"""The source and the backbone that a plan is given beside each other, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch

from loftq_cli.checkpoint.dtypes import FLOATS
from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.checkpoint.reader import read_tensor
from loftq_cli.errors import InputError
from loftq_cli.families.architecture import kind_of
from loftq_cli.families.experts import is_expert
from loftq_cli.families.kinds import turned, turned_shape
from loftq_cli.layouts.base import Matrix
from loftq_cli.numerics.finite import computable
from loftq_cli.planning.pairs import ROUNDING
from loftq_cli.planning.plan import Plan

_STEP = 2**-24
"""The least that two float16 numbers differ by."""
HINT = (
    "give the model that the backbone was made from, or take a backbone that was not rescaled "
    "(GPTQ, AutoRound, bitsandbytes)"
)


class Sides:
    """The source and the backbone of ``plan``, tensor by tensor."""

    def __init__(self, plan: Plan) -> None:
        assert plan.given is not None
        self.plan, self.given = plan, plan.given
        self._quantized = self.given.reader()
        self._places = plan.source.stored

    @cached_property
    def homes(self) -> Mapping[str, str]:
        """Names of modules in the source by what they are in memory."""
        names = self.plan.anatomy.names
        return {names.get(n, n).rpartition(".")[0]: n.rpartition(".")[0] for n in self._places}

    def changed(self) -> list[str]:
        """The vectors that differ: weights of norms, and biases."""
        found = []
        for name, (_, tensor) in self._places.items():
            if len(tensor.shape) == 1 and name.endswith((".weight", ".bias")):
                both = self.vectors(name)
                if both is not None and not alike(*both):
                    found.append(name)
        return found

    def vectors(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A vector of the source and the backbone's, float64; None if one of them has none, or not
        in floating point."""
        other = self.plan.pairs.get(name)
        if name not in self._places or other is None or other.name not in self.given.stored:
            return None
        both = [self._places[name], self.given.stored[other.name]]
        if any(tensor.dtype not in FLOATS or not tensor.elements for _, tensor in both):
            return None
        ours, theirs = (read_tensor(path, tensor).double() for path, tensor in both)
        return None if ours.shape != theirs.shape else (ours, theirs)

    @cached_property
    def compared(self) -> Mapping[str, StoredTensor]:
        """The matrices of linear layers that are in both, by name."""
        return {t.name: t for t in self.plan.source.tensors if self._is_compared(t)}

    def _is_compared(self, tensor: StoredTensor) -> bool:
        other = self.plan.pairs.get(tensor.name)
        if other is None or len(tensor.shape) != 2 or not tensor.name.endswith(".weight"):
            return False
        held = self.given.is_quantized(other) or other.dtype in FLOATS
        kind = kind_of(tensor.name, self.plan.source.config.content)
        return held and kind != "embedding" and not is_expert(tensor.name)

    def matrices(self, tensor: StoredTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """W and Q, float32 (out, in)."""
        kind = kind_of(tensor.name, self.plan.source.config.content)
        path = self._places[tensor.name][0]
        weight = computable(read_tensor(path, tensor), f"{path}: tensor {tensor.name!r}")
        shape = turned_shape((tensor.shape[0], tensor.shape[1]), kind)
        wanted = Matrix(tensor.name, shape, tensor.dtype, "", 0, 0, kind)
        matrix = self.given.matrix(wanted, self.plan.pairs[tensor.name])
        return turned(weight, kind).float().contiguous(), self._quantized(matrix)

    def refusal(self, what: str) -> InputError:
        """The error that says ``what`` is not explained."""
        return InputError(
            f"{self.given.id}: {what}: the backbone was made from another model, or rescaled in a "
            "way that is not known here",
            hint=HINT,
        )


def alike(ours: torch.Tensor, theirs: torch.Tensor, least: float = _STEP) -> bool:
    """Whether two vectors of one shape differ by at most roundings to 16 bits, and ``least``."""
    largest = torch.maximum(ours.abs(), theirs.abs())
    return bool(((ours - theirs).abs() <= ROUNDING * largest + least).all())
