"""What becomes of every tensor of a GGUF file if the codes of a conversion go into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loftq_cli.checkpoint.dtypes import torch_dtype
from loftq_cli.checkpoint.output import Output
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.checkpoint.source import Source
from loftq_cli.errors import InputError, LayoutError, listed
from loftq_cli.exporting.gguf import blocks
from loftq_cli.exporting.gguf.file import BF16, F16, GgufFile, GgufTensor, Kind
from loftq_cli.exporting.gguf.rows import DTYPES, Found, Index, Unclear, fingerprints, sampled
from loftq_cli.layouts.base import Matrix
from loftq_cli.machine.observer import Observer
from loftq_cli.merging.backbone import Backbone, open_backbone
from loftq_cli.numerics.quantizers.blocks import Quantized
from loftq_cli.numerics.quantizers.codebooks import iq4_nl
from loftq_cli.numerics.quantizers.methods import method
from loftq_cli.reporting.original import Original

_SHOWN = 5


@dataclass(frozen=True)
class Entry:
    """A tensor of the result: ``found`` None if it is copied from the skeleton. ``reason``: why it
    is in 16 bits, and not in codes."""

    skeleton: GgufTensor
    kind: Kind
    found: Found | None = None
    reason: str | None = None

    @property
    def tensor(self) -> GgufTensor:
        """As it will be, without its place."""
        return GgufTensor(self.skeleton.name, self.kind, self.skeleton.shape)


@dataclass(frozen=True)
class GgufPlan:
    """``entries`` in the order of the skeleton's tensors."""

    skeleton: GgufFile
    matrices: Codes
    entries: Sequence[Entry]

    @property
    def inexact(self) -> list[Entry]:
        """The tensors of matrices that are in 16 bits."""
        return [entry for entry in self.entries if entry.reason is not None]


class Codes:
    """The quantized matrices of ``output``."""

    def __init__(self, output: Output, source: Source) -> None:
        self.backbone: Backbone = open_backbone(output, source)

    @property
    def names(self) -> list[str]:
        return list(self.backbone.matrices)

    def matrix(self, name: str) -> Matrix:
        return self.backbone.matrices[name].matrix

    def quantized(self, name: str) -> Quantized:
        """Codes and scales of a matrix (out, in). Raises LayoutError if its layout has none."""
        held = self.backbone.matrices[name]
        found = held.layout.quantized(held.matrix, held.parts())
        if found is None:
            raise LayoutError(
                f"{name}: layout {held.layout.name} holds values, no codes",
                hint="convert with --layout loftq, gptq or compressed",
            )
        return found

    def values(self, name: str) -> torch.Tensor:
        """Q, float32 (out, in)."""
        held = self.backbone.matrices[name]
        return held.layout.decode(held.matrix, held.parts())


def make_plan(
    output: Output,
    source: Source,
    skeleton: GgufFile,
    original: Original | None,
    observer: Observer,
) -> GgufPlan:
    """What becomes of each tensor of ``skeleton`` if it gets the codes of ``output``, whose files
    are ``source``; ``original``: the checkpoint that was converted, if the skeleton is of that.

    Raises InputError if they do not belong together, LayoutError for a conversion without codes.
    """
    codes = Codes(output, source)
    for name in codes.names:
        if codes.matrix(name).kind == "embedding":
            raise LayoutError(
                f"{name}: llama.cpp has no adapters for word embeddings",
                hint="convert without --embeddings",
            )
    found = _looked_up(codes, skeleton, original, observer)
    _refuse_lost(codes, skeleton, found, original)
    entries = [_entry(codes, tensor, found.get(tensor.name)) for tensor in skeleton.tensors]
    return GgufPlan(skeleton, codes, entries)


def _looked_up(
    codes: Codes, skeleton: GgufFile, original: Original | None, observer: Observer
) -> dict[str, Found]:
    """The tensors of ``skeleton`` that hold matrices, by name."""
    widths = {name: codes.matrix(name).shape[1] for name in codes.names}
    candidates = [each for each in skeleton.tensors if len(each.shape) in (2, 3)]
    coded = [each for each in candidates if each.kind not in DTYPES]
    if coded and not any(each.kind in DTYPES for each in candidates):
        raise InputError(
            f"{skeleton.path}: it is quantized already: {coded[0].name} is {coded[0].kind.name}",
            hint="make it with --outtype f32, f16 or bf16",
        )
    found: dict[str, Found] = {}
    unclear: list[str] = []
    for kind in DTYPES:
        tensors = [each for each in candidates if each.kind == kind]
        if not tensors:
            continue
        prints = {each.name: fingerprints(_rows(skeleton.path, each)) for each in tensors}
        for read in _readings(codes, original):
            left = [each for each in tensors if each.name not in found]
            if not left:
                break
            observer.working_on(f"rows in {kind.name}")
            index = Index(widths, read, kind)
            for tensor in left:
                place = index.find(prints[tensor.name], tensor.shape[-1])
                if isinstance(place, Unclear):
                    unclear.append(f"{tensor.name}: {place.reason}")
                elif place is not None:
                    found[tensor.name] = place
    faults = [line for line in unclear if line.partition(":")[0] not in found]
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise InputError(
            f"{skeleton.path}: {'; '.join(faults[:_SHOWN])}{more}",
            hint="make the skeleton of the very model that was converted",
        )
    return found


def _readings(codes: Codes, original: Original | None) -> list[Callable[[str], torch.Tensor]]:
    """How the rows of a skeleton may have been made: of the original, of Q, of Q as layout dense
    has it."""

    def stored(name: str) -> torch.Tensor:
        return codes.values(name).to(torch_dtype(codes.matrix(name).dtype)).float()

    readings: list[Callable[[str], torch.Tensor]] = [codes.values]
    if any(codes.matrix(name).dtype != "F32" for name in codes.names):
        readings.append(stored)
    if original is not None:
        readings.insert(0, lambda name: original.read(codes.matrix(name)))
    return readings


def _rows(path: Path, tensor: GgufTensor) -> torch.Tensor:
    """The rows of a tensor in floating point, sampled."""
    return sampled(values_of(path, tensor).view(-1, tensor.shape[-1]))


def values_of(path: Path, tensor: GgufTensor) -> torch.Tensor:
    """A tensor in floating point, in its own dtype."""
    with TensorFile(path) as file:
        raw = file.read_range(tensor.start, tensor.nbytes)
    return torch.frombuffer(raw, dtype=DTYPES[tensor.kind]).view(tensor.shape)


def _refuse_lost(
    codes: Codes, skeleton: GgufFile, found: Mapping[str, Found], original: Original | None
) -> None:
    """Raise InputError for matrices that are nowhere in the skeleton, or twice."""
    homes = {name for place in found.values() for name in place.matrices}
    lost = [name for name in codes.names if name not in homes]
    if lost:
        hint = "give the checkpoint that the skeleton was made of with --source"
        if original is not None:
            hint = "make the skeleton of the model that was converted"
        raise InputError(f"{skeleton.path}: no rows of {listed(lost, 1)} are in it", hint=hint)
    for name in codes.names:
        rows = sum(
            int((place.owners == place.matrices.index(name)).sum())
            for place in found.values()
            if name in place.matrices
        )
        if rows != codes.matrix(name).shape[0]:
            raise InputError(
                f"{skeleton.path}: it holds {rows} rows of {name}, which has "
                f"{codes.matrix(name).shape[0]}",
                hint="make the skeleton of the model that was converted",
            )


def _entry(codes: Codes, tensor: GgufTensor, found: Found | None) -> Entry:
    if found is None:
        return Entry(tensor, tensor.kind)
    reasons: dict[Kind, str] = {}
    for kind in blocks.BY_SIZE:
        matrices = [codes.matrix(name) for name in found.matrices]
        lines = [
            blocks.obstacle(kind, each.method, each.bits, each.block_size, each.shape[1])
            for each in matrices
        ]
        own = [line for line in lines if line is not None]
        if not own:
            inexact = _inexact(codes, kind, found)
            if inexact is None:
                return Entry(tensor, kind, found)
            own = [inexact]
        reasons[kind] = own[0]
    wide = tensor.kind if tensor.kind in (F16, BF16) else F16
    return Entry(tensor, wide, found, _best(reasons, matrices[0]))


def _best(reasons: Mapping[Kind, str], matrix: Matrix) -> str:
    """The reason that tells most: of the type that its width is nearest to."""
    if method(matrix.method).decoding != "affine":
        return reasons[blocks.IQ4_NL]
    return reasons[blocks.Q8_0 if matrix.bits == 8 else blocks.Q4_1]


def _inexact(codes: Codes, kind: Kind, found: Found) -> str | None:
    """Why blocks of ``kind`` would mean other values, None if they mean the same."""
    for name in found.matrices:
        rows = blocks.Rows.of(codes.quantized(name), codes.matrix(name).shape)
        if rows.levels is not None and not torch.equal(rows.levels, iq4_nl()):
            return f"its levels are those of {codes.matrix(name).method}"
        raw = blocks.encode(kind, rows)
        if not torch.equal(blocks.decode(kind, raw, rows.codes.shape[1]), rows.decode()):
            return f"scales of {name} do not fit {kind.name} exactly"
    return None
