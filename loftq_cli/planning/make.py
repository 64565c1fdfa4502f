"""Making a plan: every automatic choice settled from the headers of a source."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from loftq_cli.checkpoint import dtypes
from loftq_cli.checkpoint.header import StoredTensor, TensorSpec
from loftq_cli.checkpoint.source import Source
from loftq_cli.checkpoint.stacks import Cut, Stack, cut
from loftq_cli.errors import CorruptFileError, LayoutError, UnsupportedInputError
from loftq_cli.families.anatomy import Anatomy, anatomy
from loftq_cli.families.blocks import stacks
from loftq_cli.families.experts import by_default, check_ranks, check_whole, part_of
from loftq_cli.families.kinds import turned_shape
from loftq_cli.layouts import adapter, registry
from loftq_cli.layouts.base import Layout, Matrix, Surroundings
from loftq_cli.layouts.registry import make_layout
from loftq_cli.numerics.quantizers import methods
from loftq_cli.planning.backbone_config import backbone_config
from loftq_cli.planning.choices import (
    choose_devices,
    choose_layout,
    choose_variant,
    count_cpus,
    resolve_method,
)
from loftq_cli.planning.plan import Plan, PlannedMatrix, PlannedShard
from loftq_cli.planning.selection import Selection, select
from loftq_cli.planning.widths import assign_ranks, assign_widths
from loftq_cli.settings.recipe import Recipe
from loftq_cli.settings.table import Settings
from loftq_cli.statistics.statistics import Statistics


def make_plan(source: Source, settings: Settings, statistics: Statistics | None = None) -> Plan:
    """Settle every automatic choice; ``statistics`` is the opened file ``settings.stats``.

    Raises UsageError and its kin (exit 2) for settings that this checkpoint cannot have, and
    InputError (exit 3) for checkpoints that cannot be converted.
    """
    survey = _survey(source, settings, statistics)
    widths = survey.widths(settings)
    matrices = survey.matrices(settings, widths)
    if statistics is not None:
        check_statistics(statistics, matrices)
    name, note = choose_layout(settings, matrices, survey.surroundings)
    recipe = _recipe(settings, name, matrices, survey)
    layout = make_layout(name, recipe.as_dict())
    return Plan(
        source=survey.source,
        anatomy=survey.anatomy,
        recipe=recipe,
        layout=layout,
        auto_layout=settings.layout == registry.AUTO and layout.portable,
        layout_note=note,
        selection=survey.selection,
        surroundings=survey.surroundings,
        devices=survey.devices,
        statistics=statistics,
        unsettled=frozenset(name for name, bits in widths.items() if bits is None),
        **stored(survey.source, recipe, layout, matrices),
    )


def with_fallback(plan: Plan) -> Plan:
    """The plan that goes on if a scale does not fit float16, in the layout that holds everything
    (see Recipe.with_fallback)."""
    recipe = plan.recipe.with_fallback()
    layout = make_layout(recipe.layout, recipe.as_dict())
    matrices = [item.matrix for item in plan.matrices.values()]
    return replace(
        plan,
        recipe=recipe,
        layout=layout,
        auto_layout=False,
        layout_note=None,
        **stored(plan.source, recipe, layout, matrices),
    )


def with_widths(plan: Plan, widths: Mapping[str, int]) -> Plan:
    """The plan in which those ``unsettled`` have these widths. Raises UsageError if they are not
    the same matrices."""
    entries = tuple(f"{name}={bits}" for name, bits in sorted(widths.items()))
    recipe = replace(plan.recipe, widths=entries)
    names = [tensor.name for tensor in plan.source.tensors]
    assigned = assign_widths(recipe, list(plan.matrices), names)
    matrices = [
        _in_width(item.matrix, recipe, assigned[name]) for name, item in plan.matrices.items()
    ]
    return replace(
        plan,
        recipe=recipe,
        auto_layout=False,
        unsettled=frozenset(name for name, bits in assigned.items() if bits is None),
        **stored(plan.source, recipe, plan.layout, matrices),
    )


def in_width(matrix: Matrix, recipe: Settings, bits: int) -> Matrix:
    """``matrix`` at another width, with the method that ``recipe`` has there."""
    return replace(matrix, bits=bits, method=resolve_method(recipe, bits))


def anatomy_of(source: Source) -> Anatomy:
    """What transformers makes of the tensors of ``source``."""
    shapes = {tensor.name: tensor.shape for tensor in source.tensors}
    return anatomy(source.config.content, shapes)


@dataclass(frozen=True)
class _Survey:
    """What a source has, whatever the widths and the layout will be."""

    source: Source
    anatomy: Anatomy
    selection: Selection
    surroundings: Surroundings
    devices: tuple[torch.device, ...]
    statistics: Statistics | None

    @cached_property
    def cuts(self) -> dict[str, Cut]:
        """The matrices that the checkpoint holds in stacks, by name."""
        stacks = self.anatomy.stacks.values()
        return {name: each for stack in stacks for name, each in stack.cuts().items()}

    def widths(self, settings: Settings) -> dict[str, int | None]:
        names = [tensor.name for tensor in self.selection.matrices]
        return assign_widths(settings, names, [tensor.name for tensor in self.source.tensors])

    def matrices(self, settings: Settings, widths: Mapping[str, int | None]) -> list[Matrix]:
        """The selected matrices, in file order; in the narrowest width if theirs is not settled."""
        return [
            self._matrix(tensor, settings, widths[tensor.name])
            for tensor in self.selection.matrices
        ]

    def _matrix(self, tensor: StoredTensor, settings: Settings, bits: int | None) -> Matrix:
        kind = self.selection.kinds[tensor.name]
        name = self.anatomy.names.get(tensor.name)
        home = self.anatomy.experts.get(tensor.name)
        if home is not None and (part := part_of(tensor.name.removesuffix(".weight"))):
            name = f"{home}.{part[1]}"
        matrix = Matrix(
            tensor.name,
            turned_shape((tensor.shape[0], tensor.shape[1]), kind),
            tensor.dtype,
            method="",
            bits=0,
            block_size=settings.block_size,
            kind=kind,
            in_memory=name and name.removesuffix(".weight"),
            cut=self.cuts.get(tensor.name),
        )
        return _in_width(matrix, settings, bits)


def _in_width(matrix: Matrix, settings: Settings, bits: int | None) -> Matrix:
    return in_width(matrix, settings, bits or min(methods.widths(settings.method)))


def _survey(source: Source, settings: Settings, statistics: Statistics | None) -> _Survey:
    found = anatomy_of(source)
    if found.refusal is not None:
        raise UnsupportedInputError(found.refusal, hint="config.json may name another class")
    source, selection = _selected(source, settings, found)
    surroundings = surroundings_of(source, selection, found)
    devices = choose_devices(settings.device)
    return _Survey(source, found, selection, surroundings, devices, statistics)


def _selected(source: Source, settings: Settings, found: Anatomy) -> tuple[Source, Selection]:
    """What is selected, and the source, with what lies in stacks apart if that is. Raises
    LayoutError for a layout that cannot hold matrices of stacks."""
    holder = registry.holding_everything().name
    held = settings.layout in (registry.AUTO, holder)
    wanted = [stack.tensor for stack in found.stacks.values() if _names(settings.include, stack)]
    if wanted and not held:
        raise LayoutError(
            f"--layout {settings.layout} cannot hold {wanted[0]}, which is of all experts of a "
            "layer",
            hint=f"use --layout {holder}, or leave the experts out",
        )
    apart, exclude = cut(source, found.stacks), settings.exclude
    content, rank = source.config.content, settings.rank
    experts = held and by_default(apart.tensors, content, rank, found.experts)
    left = all(_names(settings.exclude, stack) for stack in found.stacks.values())
    if found.stacks and (left or not (wanted or experts)):
        apart, experts = source, False
        names = [tensor.name for tensor in source.tensors]
        cuts = [name for stack in found.stacks.values() for name in stack.cuts()]
        exclude = tuple(
            each
            for each in exclude
            if fnmatch.filter(names, each) or not fnmatch.filter(cuts, each)
        )
    selection = select(
        apart.tensors,
        content,
        settings.include,
        exclude,
        settings.embeddings,
        found,
        experts=experts,
    )
    check_whole(selection.matrices)
    return apart, selection


def _names(patterns: Sequence[str], stack: Stack) -> bool:
    """Whether one of ``patterns`` is for a stack, or for all that lies in it."""
    names = [stack.tensor, *stack.cuts()]
    return any(
        fnmatch.fnmatchcase(stack.tensor, each) or fnmatch.filter(names[1:], each) == names[1:]
        for each in patterns
    )


def settled(
    settings: Settings,
    layout: str,
    method: str,
    device: torch.device,
    stats: str | None = None,
    structure: str | None = None,
) -> Recipe:
    """The recipe of ``settings`` once layout, method ("auto" if matrices have several) and device
    are known; ``stats`` is the sha256 of the statistics, ``structure`` that of the anatomy."""
    own = method != methods.AUTO and methods.method(method).own_scale
    return Recipe.of(
        settings,
        method=method,
        layout=layout,
        layout_fallback=None,
        scale="fixed" if own else settings.scale,
        stats=stats,
        device=device.type,
        threads=settings.threads or count_cpus(),
        kernels=str(choose_variant(device, method, settings.scale, settings.svd)),
        structure=structure,
    )


def _recipe(settings: Settings, layout: str, matrices: Sequence[Matrix], survey: _Survey) -> Recipe:
    # With a target the widths, and so perhaps the methods, are yet to come.
    several = len({matrix.method for matrix in matrices}) > 1 or settings.target_bpw is not None
    method = settings.method if several else matrices[0].method
    stats = None if survey.statistics is None else survey.statistics.sha256
    return settled(settings, layout, method, survey.devices[0], stats, survey.anatomy.sha256)


def stored(
    source: Source,
    recipe: Recipe,
    layout: Layout,
    matrices: Sequence[Matrix],
    shards: Sequence[PlannedShard] = (),
) -> dict[str, Any]:
    """The fields of a plan that say how the matrices are stored; ``shards``: where, if not in such
    as the source has."""
    ranks = assign_ranks(recipe, [matrix.name for matrix in matrices])
    planned = {}
    for matrix in matrices:
        rank = min(ranks[matrix.name], *matrix.shape)
        planned[matrix.name] = PlannedMatrix(
            matrix,
            rank,
            adapter.scaling(recipe.lora_alpha, rank),
            dtypes.resolve(recipe.adapter_dtype, matrix.dtype),
            tuple(layout.specs(matrix)),
        )
    check_ranks({name: item.rank for name, item in planned.items()}, recipe.rank)
    return {"matrices": planned, "shards": shards or _output_shards(source, planned)}


def check_statistics(statistics: Statistics, matrices: Sequence[Matrix]) -> None:
    """Raise StatisticsError if an entry does not fit its matrix, MissingStatisticsError if there
    is none for any of them."""
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


def surroundings_of(source: Source, selection: Selection, found: Anatomy) -> Surroundings:
    """What a layout's config needs to know beside the matrices."""

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
