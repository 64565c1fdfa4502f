"""How a backbone was rescaled before it was quantized: found from its norms and its values.

AWQ and SmoothQuant divide what is in front of a linear layer by a vector s and multiply the layer's
columns by it; the model computes what it did. What is divided is a norm, and then s is known from
the norm, or the rows of another matrix (v_proj for o_proj, up_proj for down_proj), and then s is
estimated from both matrices. With any s the model of Q + B A does what the original does, as long
as both sides have the same; what cannot be explained so is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.errors import InputError, UnsupportedInputError
from loftq_cli.families.blocks import block_of
from loftq_cli.families.readers import Readers, norm_readers
from loftq_cli.layouts.rescaled import Rescaled, Rescaling
from loftq_cli.machine.observer import Observer
from loftq_cli.numerics.rescaling import Scales, counterpart, fit
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.sides import HINT, Sides, alike

_SMALLEST = 2**-14
"""Smaller values have fewer than 11 bits in float16: they say little of a scale."""
_OFF = 0.25
"""The most that a scale may differ from what a bias says of it."""


def find_rescaling(plan: Plan, observer: Observer) -> Rescaling:
    """How the backbone that ``plan`` is given was rescaled: not at all if no norm and no bias of it
    differs from the source's, else from the values of all blocks. One matrix is in memory at a
    time.

    Raises InputError for a difference that no rescaling explains, UnsupportedInputError if the
    model cannot be followed, and what reading raises.
    """
    sides = Sides(plan)
    changed = sides.changed()
    if not changed:
        return Rescaling()
    observer.note(f"{changed[0]} is not the source's: looking for how the backbone was rescaled")
    finder = _Finder(sides)
    finder.follow_norms(changed)
    blocks = finder.blocks()
    observer.begin(sum(t.nbytes for block in blocks for t in block), "looking for scales")
    try:
        for block in blocks:
            fitted = []
            for tensor in block:
                observer.working_on(tensor.name)
                fitted.append(finder.fitted(tensor))
                observer.advance(tensor.nbytes)
            finder.follow_matrices(fitted)
    finally:
        observer.end()
    finder.check_biases(changed)
    return Rescaling(
        {name: vector.float() for name, vector in finder.vectors.items()}, finder.matrices
    )


@dataclass(frozen=True)
class _Fitted:
    """A matrix, and the scales of its columns and rows beside those of its norm."""

    tensor: StoredTensor
    columns: Scales
    rows: Scales

    @property
    def module(self) -> str:
        return self.tensor.name.removesuffix(".weight")


@dataclass
class _Finder:
    """``vectors`` and ``matrices``: what was found so far. ``unknown``: where a norm is zero, and
    does not tell its s. ``behind``: the matrices that read what a norm gives."""

    sides: Sides
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    matrices: dict[str, Rescaled] = field(default_factory=dict)
    unknown: dict[str, torch.Tensor] = field(default_factory=dict)
    behind: set[str] = field(default_factory=set)

    def follow_norms(self, changed: Sequence[str]) -> None:
        """The s of every norm that ``changed``, and the matrices that read what it gives."""
        modules = {name.rpartition(".")[0] for name in changed}
        readers = norm_readers(self.sides.plan.source.config.content)
        if isinstance(readers, str):
            raise UnsupportedInputError(
                f"{self.sides.given.id} was rescaled ({changed[0]} is not the source's), and what "
                f"reads it is not known: {readers}",
                hint=HINT,
            )
        for module, found in readers.items():
            home = self.sides.homes.get(module, module)
            self.behind |= {f"{self.sides.homes.get(n, n)}.weight" for n in found.linears}
            if home in modules:
                self._follow_norm(home, found)
        known = {self.sides.homes.get(module, module) for module in readers}
        for name in changed:
            module, _, last = name.rpartition(".")
            if last == "weight" and module not in known:
                raise self.sides.refusal(
                    f"{name} is not the source's, and the model calls no such norm"
                )

    def _follow_norm(self, home: str, readers: Readers) -> None:
        weights = self.sides.vectors(f"{home}.weight")
        if readers.others or readers.offset is None or weights is None or not readers.linears:
            reader = readers.others[0] if readers.others else "no linear layer"
            raise self.sides.refusal(
                f"{home}.weight is not the source's, and {reader} reads what it gives"
            )
        ours, theirs = (weight + readers.offset for weight in weights)
        unknown = (ours.abs() < _SMALLEST) & (theirs.abs() < _SMALLEST)
        s = torch.where(unknown, torch.ones_like(ours), ours / theirs)
        if not bool(((s > 0) & s.isfinite()).all()):
            raise self.sides.refusal(f"{home}.weight is not the source's times positive scales")
        self.vectors[home], self.unknown[home] = s, unknown
        for module in readers.linears:
            name = f"{self.sides.homes.get(module, module)}.weight"
            if name not in self.sides.compared:
                raise self.sides.refusal(
                    f"{home}.weight is not the source's, and {name}, which reads what it gives, is "
                    "not a matrix of both"
                )
            self.matrices[name] = Rescaled(columns=home)

    def blocks(self) -> list[list[StoredTensor]]:
        """The matrices that are compared, block by block; of those outside of blocks the ones
        behind a norm that changed."""
        found: dict[tuple[str, int] | str, list[StoredTensor]] = {}
        for name, tensor in self.sides.compared.items():
            place = block_of(name)
            if place is not None or name in self.matrices:
                found.setdefault(place or name, []).append(tensor)
        return list(found.values())

    def fitted(self, tensor: StoredTensor) -> _Fitted:
        """The scales of a matrix, beside those of the norm in front of it."""
        weight, quantized = self.sides.matrices(tensor)
        norm = self.matrices.get(tensor.name, Rescaled()).columns
        known = None if norm is None else self.vectors[norm]
        columns, rows = fit(weight, quantized, known)
        if norm is not None:
            unknown = self.unknown[norm] & columns.known
            if bool(unknown.any()):
                self.vectors[norm] = torch.where(unknown, columns.values, self.vectors[norm])
                self.unknown[norm] &= ~unknown
                columns = replace(columns, values=torch.where(unknown, 1.0, columns.values))
            if (told := columns.told()) is not None:
                raise self.sides.refusal(
                    f"the columns of {tensor.name} do not make up for {norm}.weight, which is not "
                    f"the source's (off {told})"
                )
        return _Fitted(tensor, columns, rows)

    def follow_matrices(self, block: Sequence[_Fitted]) -> None:
        """The s of every pair of matrices in a ``block`` of which one was divided for the other.
        Raises InputError if scales are left that nothing explains."""
        divided: set[str] = set()
        for later in block:
            found = [
                (each.tensor.name, *alike)
                for each in block
                if later.tensor.name not in self.behind
                if each is not later and each.tensor.name not in divided
                if (alike := _counterpart(later, each)) is not None
            ]
            s = None
            if found:
                name, _, estimated = max(found, key=lambda each: each[1])
                divided.add(name)
                s = self._exactly(name, estimated)
                module = name.removesuffix(".weight")
                self.vectors[module] = s
                self._note(later.tensor.name, columns=module)
                self._note(name, rows=module)
            columns = later.columns if s is None else later.columns.over(s)
            if (told := columns.told()) is not None:
                raise self.sides.refusal(
                    f"the columns of {later.tensor.name} were scaled ({told}), and no norm and no "
                    "matrix in front of them was divided for that"
                )
        for each in block:
            rows = each.rows
            if each.tensor.name in divided:
                s = self.vectors[each.module]
                whole = torch.ones(len(rows), dtype=s.dtype)
                whole[-len(s) :] = 1 / s
                rows = rows.over(whole)
            if (told := rows.told()) is not None:
                raise self.sides.refusal(
                    f"the rows of {each.tensor.name} were scaled ({told}), and no matrix behind "
                    "them makes up for that"
                )

    def _note(self, name: str, **vectors: str) -> None:
        self.matrices[name] = replace(self.matrices.get(name, Rescaled()), **vectors)

    def _exactly(self, name: str, estimated: Scales) -> torch.Tensor:
        """What the rows of a matrix were ``estimated`` to be divided by, as its bias says where it
        is large enough: that was divided, too, and cannot be corrected."""
        bias = f"{name.removesuffix('.weight')}.bias"
        both = self.sides.vectors(bias)
        if both is None:
            return estimated.values
        ours, theirs = (each[-len(estimated) :] for each in both)
        large = theirs.abs() >= _SMALLEST
        stated = torch.where(large, ours / theirs, estimated.values)
        off = (stated / estimated.values - 1).abs() > torch.clamp(10 * estimated.errors, min=_OFF)
        if bool((off | (stated <= 0)).any()):
            raise self._of_bias(bias)
        return stated

    def _of_bias(self, name: str) -> InputError:
        return self.sides.refusal(
            f"{name} is not the source's, and not scaled as what it is added to"
        )

    def check_biases(self, changed: Sequence[str]) -> None:
        """Raise InputError if a bias ``changed`` other than what it is added to."""
        for name in changed:
            module, _, last = name.rpartition(".")
            both = self.sides.vectors(name)
            if last != "bias" or both is None:
                continue
            ours, theirs = both
            rescaled = self.matrices.get(f"{module}.weight", Rescaled())
            divided = module if f"{module}.weight" not in self.matrices else rescaled.rows
            s = self.vectors.get(divided or "")
            if s is not None:
                ours = ours.clone()
                ours[-len(s) :] /= s
            if not alike(ours, theirs, least=_SMALLEST):
                raise self._of_bias(name)


def _counterpart(later: _Fitted, earlier: _Fitted) -> tuple[float, Scales] | None:
    """How alike the columns of one and the rows of the other are, and their s. Of an ``earlier``
    that is two matrices in one (gate_up_proj) the second may be it."""
    width = len(later.columns)
    halves = "gate_up" in earlier.tensor.name and len(earlier.rows) == 2 * width
    if len(earlier.rows) != width and not halves:
        return None
    return counterpart(later.columns, earlier.rows.last(width))
