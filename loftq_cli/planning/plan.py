"""What will be done, settled from the headers before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from loftq_cli.checkpoint import dtypes
from loftq_cli.checkpoint.header import DTYPE_BITS, StoredTensor, TensorSpec
from loftq_cli.checkpoint.source import Shard, Source, source_identity
from loftq_cli.checkpoint.writer import place
from loftq_cli.errors import CorruptFileError
from loftq_cli.families.anatomy import Anatomy, anatomy
from loftq_cli.families.experts import check_ranks
from loftq_cli.families.kinds import turned_shape
from loftq_cli.layouts import Layout, adapter, make_layout
from loftq_cli.layouts.base import Matrix, Surroundings
from loftq_cli.numerics import feedback
from loftq_cli.numerics.quantizers.scale_storage import ScaleDtype
from loftq_cli.planning.backbone_config import backbone_config
from loftq_cli.planning.choices import (
    choose_device,
    choose_layout,
    choose_variant,
    count_cpus,
    resolve_method,
)
from loftq_cli.planning.selection import Selection, select, stacks
from loftq_cli.planning.widths import assign_ranks, assign_widths, candidates
from loftq_cli.settings.recipe import FIXED_SCALE_METHODS, Recipe, Settings, fingerprint
from loftq_cli.statistics.statistics import Statistics


@dataclass(frozen=True)
class PlannedMatrix:
    """A matrix with its adapter: ``rank`` as clamped, ``scaling`` as PEFT will apply it."""

    matrix: Matrix
    rank: int
    scaling: float
    adapter_dtype: str
    specs: tuple[TensorSpec, ...]

    @property
    def adapter_specs(self) -> list[TensorSpec]:
        return adapter.specs(self.matrix, self.rank, self.adapter_dtype)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the backbone per weight: codes, scales, zero points and tables."""
        return sum(spec.nbytes for spec in self.specs) * 8 / self.matrix.elements


@dataclass(frozen=True)
class PlannedShard:
    """An output shard and the source shard whose tensors it takes."""

    source: Shard
    name: str
    specs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Plan:
    """A conversion, before it starts. ``auto_layout``: the layout may still be changed to
    ``loftq`` where a scale turns out not to fit float16. ``unsettled``: matrices that have the
    narrowest width until the recipe's target has settled theirs (see target.py)."""

    source: Source
    anatomy: Anatomy
    recipe: Recipe
    layout: Layout
    auto_layout: bool
    layout_note: str | None
    matrices: Mapping[str, PlannedMatrix]
    selection: Selection
    shards: Sequence[PlannedShard]
    surroundings: Surroundings
    device: torch.device
    unsettled: frozenset[str]
    statistics: Statistics | None
    remarks: tuple[str, ...] = ()
    """What the user is to hear before it starts."""

    @property
    def unmeasured(self) -> list[str]:
        """The matrices that the statistics hold nothing for, which are converted without."""
        if self.statistics is None:
            return []
        return [name for name in self.matrices if name not in self.statistics.matrices]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.recipe.as_dict(), source_identity(self.source))

    @property
    def source_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.source.tensors)

    @property
    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.source.tensors)

    @property
    def backbone_bytes(self) -> int:
        return sum(spec.nbytes for shard in self.shards for spec in shard.specs)

    @property
    def adapter_specs(self) -> list[TensorSpec]:
        return [spec for item in self.matrices.values() for spec in item.adapter_specs]

    @property
    def adapter_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.adapter_specs)

    @property
    def bits_per_weight(self) -> float:
        stored = sum(spec.nbytes for item in self.matrices.values() for spec in item.specs)
        return stored * 8 / sum(item.matrix.elements for item in self.matrices.values())

    @property
    def disk_bytes(self) -> int:
        """Bytes of all tensor files, headers included."""
        files = [list(shard.specs) for shard in self.shards] + [self.adapter_specs]
        return sum(len(place(specs)[0]) + sum(spec.nbytes for spec in specs) for specs in files)

    @property
    def memory_bytes(self) -> int:
        """Estimated peak for the largest matrix, above what importing torch takes: the source's
        bytes, those of the next one too, W - Q in float32 and in the products' dtype, three sets of
        codes, the thin factors, and with statistics the second moments, what the adapter leaves of
        W - Q, and what feedback makes of full moments."""
        moments = 0
        if self.statistics is not None:
            entries = self.statistics.entries.values()
            sides = ((e.in_features, e.in_features if e.kind == "full" else 1) for e in entries)
            moments = max(rows * columns for rows, columns in sides) * 8
            moments += max(item.matrix.elements for item in self.matrices.values()) * 4
            if self.recipe.feedback and any(entry.kind == "full" for entry in entries):
                shapes = (item.matrix.shape for item in self.matrices.values())
                moments += max(feedback.working_bytes(*shape, self.device) for shape in shapes)
        return max(_working_set(item) for item in self.matrices.values()) + moments

    def with_fallback(self) -> Plan:
        """The plan that continues with layout ``loftq`` (see Recipe.with_fallback)."""
        return _assemble(
            self.source,
            self.anatomy,
            self.recipe.with_fallback(),
            self.selection,
            self.device,
            auto_layout=False,
            layout_note=None,
            statistics=self.statistics,
        )

    def with_widths(self, widths: Mapping[str, int]) -> Plan:
        """The plan in which those ``unsettled`` have these widths. Raises UsageError where they
        are not the same matrices."""
        entries = tuple(f"{name}={bits}" for name, bits in sorted(widths.items()))
        return _assemble(
            self.source,
            self.anatomy,
            replace(self.recipe, widths=entries),
            self.selection,
            self.device,
            auto_layout=False,
            layout_note=self.layout_note,
            statistics=self.statistics,
        )


def make_plan(source: Source, settings: Settings, statistics: Statistics | None = None) -> Plan:
    """Settle every automatic choice; ``statistics`` is the opened file ``settings.stats``.

    Raises UsageError and its kin (exit 2) for settings that this checkpoint cannot have, and
    InputError (exit 3) for checkpoints that cannot be converted.
    """
    found = anatomy_of(source)
    selection = select(
        source.tensors,
        source.config.content,
        settings.include,
        settings.exclude,
        settings.embeddings,
        found,
    )
    device = choose_device(settings.device)
    widths = _widths(source, selection, settings)
    matrices = [
        _matrix(tensor, selection, found, settings, widths) for tensor in selection.matrices
    ]
    if statistics is not None:
        _check_statistics(statistics, matrices)
    methods = {matrix.method for matrix in matrices}
    several = len(methods) > 1 or settings.target_bpw is not None
    method = settings.method if several else methods.pop()
    surroundings = _surroundings(source, selection, found)
    layout_name, note = choose_layout(settings, matrices, surroundings)
    recipe = Recipe(
        bits=settings.bits,
        method=method,
        rank=settings.rank,
        iters=settings.iters,
        block_size=settings.block_size,
        layout=layout_name,
        layout_fallback=None,
        scale="fixed" if method in FIXED_SCALE_METHODS else settings.scale,
        scale_dtype=settings.scale_dtype,
        order=settings.order,
        svd=settings.svd,
        keep=settings.keep,
        momentum=settings.momentum,
        feedback=settings.feedback,
        include=settings.include,
        exclude=settings.exclude,
        embeddings=settings.embeddings,
        stats=None if statistics is None else statistics.sha256,
        lora_alpha=settings.lora_alpha,
        adapter_dtype=settings.adapter_dtype,
        dense_dtype=settings.dense_dtype,
        device=device.type,
        threads=settings.threads or count_cpus(),
        seed=settings.seed,
        kernels=str(choose_variant(device, method, settings.scale, settings.svd)),
        bits_map=settings.bits_map,
        rank_map=settings.rank_map,
        target_bpw=settings.target_bpw,
        widths=settings.widths,
        structure=found.sha256,
    )
    auto = settings.layout == "auto"
    return _assemble(
        source,
        found,
        recipe,
        selection,
        device,
        auto_layout=auto,
        layout_note=note,
        statistics=statistics,
    )


def anatomy_of(source: Source) -> Anatomy:
    """What transformers makes of the tensors of ``source``."""
    shapes = {tensor.name: tensor.shape for tensor in source.tensors}
    return anatomy(source.config.content, shapes)


def _assemble(
    source: Source,
    found: Anatomy,
    recipe: Recipe,
    selection: Selection,
    device: torch.device,
    *,
    auto_layout: bool,
    layout_note: str | None,
    statistics: Statistics | None,
) -> Plan:
    layout = make_layout(recipe.layout, recipe.dense_dtype, cast(ScaleDtype, recipe.scale_dtype))
    matrices = {}
    widths = _widths(source, selection, recipe)
    ranks = assign_ranks(recipe, list(widths))
    for tensor in selection.matrices:
        matrix = _matrix(tensor, selection, found, recipe, widths)
        rank = min(ranks[tensor.name], *matrix.shape)
        matrices[tensor.name] = PlannedMatrix(
            matrix,
            rank,
            1.0 if recipe.lora_alpha is None else recipe.lora_alpha / rank,
            dtypes.resolve(recipe.adapter_dtype, tensor.dtype),
            tuple(layout.specs(matrix)),
        )
    check_ranks({name: item.rank for name, item in matrices.items()}, recipe.rank)
    return Plan(
        source=source,
        anatomy=found,
        recipe=recipe,
        layout=layout,
        auto_layout=auto_layout and recipe.layout == "gptq",
        layout_note=layout_note,
        matrices=matrices,
        selection=selection,
        shards=_output_shards(source, matrices),
        surroundings=_surroundings(source, selection, found),
        device=device,
        statistics=statistics,
        unsettled=frozenset(name for name, bits in widths.items() if bits is None),
    )


def _check_statistics(statistics: Statistics, matrices: Sequence[Matrix]) -> None:
    """Raise StatisticsError where an entry does not fit its matrix, MissingStatisticsError where
    there is none for any of them."""
    widths = {matrix.name: matrix.shape[1] for matrix in matrices if matrix.kind != "embedding"}
    measured = {name: width for name, width in widths.items() if name in statistics.matrices}
    statistics.require(measured or widths)


def _output_shards(source: Source, matrices: Mapping[str, PlannedMatrix]) -> list[PlannedShard]:
    count = len(source.shards)
    planned, seen = [], set[str]()
    for number, shard in enumerate(source.shards, start=1):
        specs: list[TensorSpec] = []
        for tensor in shard.header.tensors:
            item = matrices.get(tensor.name)
            kept = TensorSpec(tensor.name, tensor.dtype, tensor.shape)
            specs += item.specs if item else [kept]
        for spec in specs:
            if spec.name in seen:
                raise CorruptFileError(f"{shard.name}: the name {spec.name!r} is already taken")
            seen.add(spec.name)
        single = "model.safetensors"
        name = single if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        planned.append(PlannedShard(shard, name, tuple(specs)))
    return planned


def _widths(source: Source, selection: Selection, settings: Settings) -> dict[str, int | None]:
    names = [tensor.name for tensor in selection.matrices]
    return assign_widths(settings, names, [tensor.name for tensor in source.tensors])


def _matrix(
    tensor: StoredTensor,
    selection: Selection,
    found: Anatomy,
    settings: Settings,
    widths: Mapping[str, int | None],
) -> Matrix:
    first, second = tensor.shape
    kind = selection.kinds[tensor.name]
    bits = widths[tensor.name] or min(candidates(settings.method))
    method = resolve_method(settings, bits)
    shape = turned_shape((first, second), kind)
    name = found.names.get(tensor.name)
    in_memory = name and name.removesuffix(".weight")
    return Matrix(
        tensor.name, shape, tensor.dtype, method, bits, settings.block_size, kind, in_memory
    )


def _surroundings(source: Source, selection: Selection, found: Anatomy) -> Surroundings:
    def in_memory(tensor: StoredTensor) -> str:
        return found.names.get(tensor.name, tensor.name)

    kept_modules = [
        in_memory(tensor).removesuffix(".weight")
        for tensor, _ in selection.kept
        if tensor.name.endswith(".weight") and len(tensor.shape) == 2
    ]
    names = [in_memory(tensor) for tensor in selection.matrices]
    outside = [name for name in names if not stacks([name])]
    config = backbone_config(source.config.content, (t.dtype for t in selection.matrices))
    return Surroundings(config, kept_modules, stacks(names) + outside)


def _working_set(item: PlannedMatrix) -> int:
    rows, columns = item.matrix.shape
    thin = (rows + columns) * 2 * max(item.rank, 16) * 4 * 4
    source = DTYPE_BITS[item.matrix.dtype] // 8
    return item.matrix.elements * (2 * source + 4 + 2 + 3) + thin
