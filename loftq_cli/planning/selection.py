"""Which tensors are weight matrices to quantize, from their names, shapes and dtypes alone.

By default: two-dimensional floating-point ``….weight`` tensors inside the repeated blocks (a path
with a number in it), which are the linear layers of attention and MLP. On request: word embeddings,
and what patterns name. Everything else is passed through. Every tensor has a reason.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from loftq_cli.checkpoint.dtypes import FLOATS
from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.errors import PatternError, UnsupportedInputError, UsageError, printable
from loftq_cli.families.anatomy import Anatomy
from loftq_cli.families.architecture import EMBEDDING, HEAD, NORM, kind_of, left_alone, shared_with
from loftq_cli.families.blocks import is_in_block
from loftq_cli.families.experts import check, is_expert
from loftq_cli.families.kinds import Kind


@dataclass(frozen=True)
class Selection:
    """``matrices`` to quantize, in file order, with what each is (``kinds``) and why it is
    selected (``reasons``), by name; ``kept``: (tensor, reason) for all others."""

    matrices: list[StoredTensor]
    kept: list[tuple[StoredTensor, str]]
    kinds: Mapping[str, Kind]
    reasons: Mapping[str, str]


def select(
    tensors: Sequence[StoredTensor],
    config: Mapping[str, Any],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    anatomy: Anatomy = Anatomy(),  # noqa: B008  (frozen)
    *,
    experts: bool = False,
) -> Selection:
    """Split ``tensors`` by the default rule, plus word ``embeddings``, plus ``include``, less
    ``exclude`` (globs on names), less what ``anatomy`` or config.json rules out. ``experts``: those
    of mixtures belong to the default.

    Raises PatternError if a pattern matches nothing it could apply to, UsageError if a matrix is
    asked for that cannot be quantized, UnsupportedInputError if no matrix is selected.
    """
    names = [tensor.name for tensor in tensors]
    alone = left_alone(tensors, config)
    ruled_out = {**anatomy.reasons, **alone}
    fused = {name for name in alone if is_expert(name)} if experts else None
    rule = _Rule.of(tensors, include, exclude, embeddings, ruled_out, fused)
    matrices, kept = [], []
    kinds: dict[str, Kind] = {}
    reasons: dict[str, str] = {}
    emptied = False
    for tensor in tensors:
        kind = kind_of(tensor.name, config)
        selected, reason = rule.decide(tensor, kind)
        if selected:
            matrices.append(tensor)
            kinds[tensor.name], reasons[tensor.name] = kind, reason
        else:
            kept.append((tensor, reason))
        emptied |= tensor.name in rule.excluded and rule.default(tensor, kind)[0]
    if not matrices:
        _refuse_nothing(kept, emptied)
    _refuse_shared(kinds, config, names)
    _refuse_ruled_out(kinds, ruled_out)
    check(kinds, [each for each, _ in kept if each.name not in alone], config, anatomy.experts)
    if embeddings and "embedding" not in kinds.values():
        raise UsageError("--embeddings: the checkpoint has no word embedding to quantize")
    return Selection(matrices, kept, kinds, reasons)


@dataclass(frozen=True)
class _Rule:
    """What is asked for, by name: patterns resolved, and what no model could load."""

    quantizable: Collection[str]
    included: Collection[str]
    excluded: Collection[str]
    embeddings: bool
    ruled_out: Mapping[str, str]
    no_experts: Collection[str] | None
    """Experts of blocks that the model does not have; None: experts are no default at all."""

    @staticmethod
    def of(
        tensors: Sequence[StoredTensor],
        include: Sequence[str],
        exclude: Sequence[str],
        embeddings: bool,
        ruled_out: Mapping[str, str],
        no_experts: Collection[str] | None,
    ) -> _Rule:
        names = [tensor.name for tensor in tensors]
        able = {tensor.name for tensor in tensors if _not_a_matrix(tensor) is None}
        included = {n for each in include for n in _matches("--include", each, names, able)}
        excluded = {n for each in exclude for n in _matches("--exclude", each, names, set(names))}
        return _Rule(able, included, excluded, embeddings, ruled_out, no_experts)

    def default(self, tensor: StoredTensor, kind: Kind) -> tuple[bool, str]:
        """Whether a tensor is selected, and why or why not, patterns apart."""
        if self.embeddings and kind == "embedding" and tensor.name in self.quantizable:
            return True, "asked for by --embeddings"
        if is_expert(tensor.name) and self.no_experts is not None:
            if tensor.name in self.no_experts:
                return False, self.ruled_out[tensor.name]
            if tensor.name in self.quantizable:
                return True, "expert"
        reason = _not_a_matrix(tensor) or _outside_rule(tensor.name)
        reason = reason or self.ruled_out.get(tensor.name)
        return (False, reason) if reason else (True, "linear layer of a block")

    def decide(self, tensor: StoredTensor, kind: Kind) -> tuple[bool, str]:
        """As :meth:`default`, with patterns. Raises UsageError for an embedding of something
        else than words."""
        if tensor.name in self.excluded:
            return False, "excluded by --exclude"
        selected, reason = self.default(tensor, kind)
        if tensor.name not in self.included or tensor.name not in self.quantizable:
            return selected, reason
        if EMBEDDING.search(tensor.name) and kind != "embedding":
            raise UsageError(
                f"--include: {tensor.name} is an embedding, but not of words",
                hint="narrow the pattern",
            )
        return True, reason if selected else "asked for by --include"


def _refuse_nothing(kept: Sequence[tuple[StoredTensor, str]], emptied: bool) -> NoReturn:
    """Say why nothing is selected: because of --exclude, or because of what the tensors are."""
    if emptied:
        raise UsageError("--exclude leaves no matrix to quantize", hint="narrow the patterns")
    counts = Counter(reason for _, reason in kept)
    listed = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    raise UnsupportedInputError(
        f"no weight matrix is selected; the tensors are: {listed}",
        hint="--include selects what the default rule leaves out",
    )


def _refuse_ruled_out(selected: Iterable[str], ruled_out: Mapping[str, str]) -> None:
    """What somebody asked for, and no model could load."""
    for name in selected:
        if name in ruled_out and not is_expert(name):
            raise UsageError(
                f"{name} cannot be quantized: {ruled_out[name]}", hint="narrow the patterns"
            )


def _refuse_shared(
    kinds: Mapping[str, Kind], config: Mapping[str, Any], names: Sequence[str]
) -> None:
    """A matrix has one adapter: what else uses the weight would get Q without it."""
    for name, kind in kinds.items():
        other = shared_with(name, config, names) if kind == "embedding" else None
        if other is not None:
            raise UsageError(
                f"{name} is {other} too, and only one of them would have the adapter",
                hint="leave it in floating point, or untie the model first",
            )


def _not_a_matrix(tensor: StoredTensor) -> str | None:
    if not tensor.name.endswith(".weight"):
        return "not a weight"
    if tensor.dtype not in FLOATS:
        return f"dtype {tensor.dtype}"
    if len(tensor.shape) != 2:
        return f"{len(tensor.shape)}-dimensional"
    if tensor.elements == 0:
        return "empty"
    return None


def _outside_rule(name: str) -> str | None:
    for pattern, reason in (
        (EMBEDDING, "embedding"),
        (NORM, "normalisation"),
        (HEAD, "head"),
    ):
        if pattern.search(name):
            return reason
    if is_expert(name):
        return "expert: consumers fuse these in memory"
    return None if is_in_block(name) else "outside the repeated blocks"


def excluded(tensors: Sequence[StoredTensor], patterns: Sequence[str]) -> set[str]:
    """The names that the ``patterns`` of --exclude match. Raises PatternError for one that matches
    none."""
    names = [tensor.name for tensor in tensors]
    return {name for each in patterns for name in _matches("--exclude", each, names, set(names))}


def _matches(option: str, pattern: str, names: Sequence[str], eligible: set[str]) -> list[str]:
    matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not matched:
        near = difflib.get_close_matches(pattern.strip("*"), names, n=3, cutoff=0.3)
        near_text = f"; near names: {', '.join(printable(name) for name in near)}" if near else ""
        raise PatternError(f"{option} {pattern!r} matches no tensor{near_text}")
    if not eligible.intersection(matched):
        raise PatternError(f"{option} {pattern!r} matches no weight matrix, only {matched[0]!r}")
    return matched
