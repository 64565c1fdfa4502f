"""Residuals of an output computed again, from its packed bytes and the original weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from loftq_cli.checkpoint.dtypes import resolve
from loftq_cli.checkpoint.header import HeaderError, read_header
from loftq_cli.checkpoint.output import Output, require_backbone
from loftq_cli.checkpoint.stored import Stored, read
from loftq_cli.errors import InputError, LoftqError, VerificationError
from loftq_cli.layouts import adapter
from loftq_cli.layouts.base import Matrix, matrix_of
from loftq_cli.layouts.fused import Member, fused_adapters, is_fused
from loftq_cli.layouts.registry import layout_of, make_layout
from loftq_cli.layouts.rescaled import Rescaling
from loftq_cli.numerics.decomposition import Decomposition
from loftq_cli.numerics.metrics import squared_norm
from loftq_cli.planning.decomposer import Decomposer
from loftq_cli.reporting.original import Original, converted_source
from loftq_cli.settings.recipe import Recipe
from loftq_cli.statistics.file import statistics_for
from loftq_cli.statistics.statistics import Kind, Statistics


@dataclass(frozen=True)
class Recomputed:
    """Absolute Frobenius norms of one matrix."""

    weight: float
    quantized: float
    final: float


@dataclass(frozen=True)
class Weighted(Recomputed):
    """The same norms of the layer's outputs, with statistics of this kind."""

    kind: Kind


def recompute(
    output: Output, model: str, stats: str | None = None, *, offline: bool = False
) -> dict[str, tuple[Recomputed, Weighted | None]]:
    """Norms of every matrix, from the stored bytes and the weights of ``model``; weighted ones
    if there are statistics of it in the file ``stats``. A model on the hub that was converted is
    read at the commit that it was converted from.

    Raises InputError if either is not what was converted, or cannot be read.
    """
    if "merged" in output.manifest.get("exported", {}):
        raise InputError(
            f"{output.directory}: a trained adapter was merged into its codes",
            hint="its residuals are of that sum, which no checkpoint holds: leave out --source",
        )
    require_backbone(output)
    reread = Reread(output, model, stats, offline=offline)
    return {record["name"]: reread.norms(record) for record in output.records}


class Reread:
    """The matrices of ``output`` as they are stored, beside the weights of ``model``."""

    def __init__(
        self, output: Output, model: str, stats: str | None = None, *, offline: bool = False
    ) -> None:
        """Raises what :func:`recompute` does."""
        source = converted_source(output, model, offline=offline)
        statistics = None if stats is None else statistics_for(source, stats)
        self._output = output
        self._original = Original(output, source)
        self.decomposer = _decomposer(output, statistics, self._original.rescaling)
        self._original.bring()
        self._stored = _stored_tensors(output)
        self._pairs = _Pairs(output, self._stored)

    def weight(self, matrix: Matrix) -> torch.Tensor:
        """W, float32 (out, in)."""
        return self._original.read(matrix)

    def residual(
        self, record: Mapping[str, Any], matrix: Matrix, weight: torch.Tensor
    ) -> torch.Tensor:
        """W - Q - B A of a matrix, float32 (out, in)."""
        recipe = self._output.manifest["recipe"]
        lora_A, lora_B = self._pairs.of(matrix)
        scaling = adapter.scaling(recipe["lora_alpha"], record["rank"])
        residual = weight - self._decoded(record, matrix)
        return residual.addmm_(lora_B.float() * scaling, lora_A.float(), alpha=-1)

    def without(
        self, record: Mapping[str, Any], matrix: Matrix, weight: torch.Tensor
    ) -> torch.Tensor:
        """W less what it is without an adapter, float32 (out, in): quantized alone, or as the
        backbone has it if that was given. Raises InputError as :meth:`norms`."""
        if self._output.is_adapted:
            return weight - self._decoded(record, matrix)
        return weight - self._alone(matrix, weight).backbone()

    def _decoded(self, record: Mapping[str, Any], matrix: Matrix) -> torch.Tensor:
        """Q of a matrix, as it is stored."""
        layout = layout_of(record, self._output.manifest["recipe"])
        directory, stored = self._output.directory, self._stored
        tensors = {spec.name: read(directory, stored, spec) for spec in layout.specs(matrix)}
        return layout.decode(matrix, tensors)

    def _alone(self, matrix: Matrix, weight: torch.Tensor) -> Decomposition:
        try:
            return self.decomposer.quantize(weight, matrix)
        except LoftqError as error:
            raise InputError(
                f"tensor {matrix.name!r}: {error.message}",
                hint="give the checkpoint that was converted",
            ) from error

    def norms(self, record: Mapping[str, Any]) -> tuple[Recomputed, Weighted | None]:
        """Of one matrix. Raises InputError if the weights cannot be quantized: those that were
        converted could."""
        matrix = matrix_of(record)
        weight = self.weight(matrix)
        residual = self.residual(record, matrix, weight)
        if self._output.is_adapted:
            return self._of_given(record, matrix, weight, residual)
        final = math.sqrt(squared_norm(residual))
        plain = self._alone(matrix, weight)
        norms = Recomputed(plain.weight_norm, plain.quantized_norm, final)
        kind, weighting = self.decomposer.kind(matrix), self.decomposer.weighting(matrix)
        if kind is None or weighting is None or plain.weighted is None:
            return norms, None
        stated = plain.weighted
        return norms, Weighted(stated.weight, stated.quantized, weighting.norm(residual), kind)

    def _of_given(
        self,
        record: Mapping[str, Any],
        matrix: Matrix,
        weight: torch.Tensor,
        residual: torch.Tensor,
    ) -> tuple[Recomputed, Weighted | None]:
        """As :meth:`norms`, of a backbone that nobody here quantized."""
        before = self.without(record, matrix, weight)
        whole, lost, left = (math.sqrt(squared_norm(each)) for each in (weight, before, residual))
        plain = Recomputed(whole, lost, left)
        kind, weighting = self.decomposer.kind(matrix), self.decomposer.weighting(matrix)
        if kind is None or weighting is None:
            return plain, None
        whole, lost, left = (weighting.norm(each) for each in (weight, before, residual))
        return plain, Weighted(whole, lost, left, kind)


class _Pairs:
    """The pairs of the start in ``output``, matrix by matrix."""

    def __init__(self, output: Output, stored: Stored) -> None:
        recipe = output.manifest["recipe"]
        members = [
            Member(matrix, record["rank"], resolve(recipe["adapter_dtype"], matrix.dtype))
            for record, matrix in ((each, matrix_of(each)) for each in output.records)
        ]
        self._alone = {each.matrix.name: each for each in members if not is_fused(each.matrix)}
        fused = fused_adapters(each for each in members if is_fused(each.matrix))
        self._fused = {
            member.matrix.name: (each, number)
            for each in fused
            for number, member in enumerate(each.members)
        }
        # A fused one is read for each of its experts.
        self._read = lru_cache(maxsize=4)(partial(read, output.directory, stored))

    def of(self, matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, in) and B (out, rank)."""
        if matrix.name in self._alone:
            own = self._alone[matrix.name]
            specs = adapter.specs(matrix, own.rank, own.dtype)
            first, second = map(self._read, specs)
            return adapter.sides(matrix, first, second)
        fused, number = self._fused[matrix.name]
        lora_A, lora_B = map(self._read, fused.specs())
        return fused.pair(number, lora_A, lora_B)


def _decomposer(output: Output, statistics: Statistics | None, rescaling: Rescaling) -> Decomposer:
    """What quantizes as the conversion did. Raises InputError if it used other statistics."""
    stated = output.manifest["recipe"]["stats"]
    if statistics is not None and stated is not None and stated != statistics.sha256:
        raise InputError(
            f"{statistics.path}: of sha256 {statistics.sha256}, the conversion used statistics "
            f"of {stated}",
            hint="give the file that was converted with",
        )
    recipe = output.manifest["recipe"]
    layout = make_layout(recipe["layout"], recipe)
    return Decomposer(Recipe.read(recipe), layout, torch.device("cpu"), statistics, rescaling)


def _stored_tensors(output: Output) -> Stored:
    """Those of backbone and adapter: other folders hold weights of a pipeline's further modules."""
    stored = {}
    for entry in output.manifest["outputs"]:
        folder = entry["name"].rpartition("/")[0]
        if entry["name"].endswith(".safetensors") and folder in ("", adapter.DIRECTORY):
            path = output.directory / entry["name"]
            try:
                header = read_header(path)
            except (HeaderError, OSError) as error:
                raise VerificationError(f"{path}: {error}") from error
            stored.update({tensor.name: (path, tensor) for tensor in header.tensors})
    return stored
