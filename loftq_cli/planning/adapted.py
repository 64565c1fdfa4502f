"""The plan of an adapter for a backbone that exists: the conversion whose codes are given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from loftq_cli.checkpoint.header import StoredTensor, TensorSpec
from loftq_cli.checkpoint.source import Source
from loftq_cli.errors import UnsupportedInputError, UsageError, listed
from loftq_cli.families.anatomy import Anatomy, anatomy
from loftq_cli.families.architecture import kind_of, shared_with
from loftq_cli.families.experts import is_expert
from loftq_cli.families.kinds import turned_shape
from loftq_cli.layouts.base import Matrix
from loftq_cli.numerics.quantizers import methods
from loftq_cli.numerics.variant import Variant
from loftq_cli.planning.choices import choose_devices
from loftq_cli.planning.given import Given
from loftq_cli.planning.make import anatomy_of, check_statistics, settled, stored, surroundings_of
from loftq_cli.planning.pairs import paired
from loftq_cli.planning.plan import Plan, PlannedShard
from loftq_cli.planning.selection import Selection, excluded, select
from loftq_cli.settings.recipe import Recipe
from loftq_cli.settings.table import Settings
from loftq_cli.statistics.statistics import Statistics

_EXPERT = "expert: an adapter for it is not made"
_NO_ADAPTER = "no adapter: "


def make_adapted_plan(
    source: Source, given: Given, settings: Settings, statistics: Statistics | None = None
) -> Plan:
    """How the matrices of ``given``, which was made from ``source``, get their adapters.

    Raises UsageError and its kin for settings that these cannot have, and InputError if there is
    nothing to correct, or if they are not of one model.
    """
    _refuse_nothing_to_correct(source, given)
    found = anatomy_of(source)
    theirs = {tensor.name: tensor.shape for tensor in given.tensors}
    pairs = paired(source, given, found.names, anatomy(given.raw.config.content, theirs).names)
    selection = _selection(source, given, settings, found, pairs)
    matrices = [
        given.matrix(_matrix(tensor, selection, found), pairs[tensor.name])
        for tensor in selection.matrices
    ]
    if statistics is not None:
        check_statistics(statistics, matrices)
    recipe = _recipe(settings, given, statistics, found)
    return Plan(
        source=source,
        anatomy=found,
        recipe=recipe,
        layout=given.layout,
        auto_layout=False,
        layout_note=None,
        selection=selection,
        surroundings=surroundings_of(source, selection, found),
        devices=choose_devices(settings.device),
        statistics=statistics,
        unsettled=frozenset(),
        given=given,
        pairs=pairs,
        **stored(source, recipe, given.layout, matrices, _shards(source)),
    )


def adapted_remarks(plan: Plan) -> Iterator[str]:
    """What the user is to hear of the plan of an adapter before it is carried out."""
    given = plan.given
    assert given is not None
    if plan.unmeasured and plan.statistics is not None:
        yield (
            f"{len(plan.unmeasured)} of {len(plan.matrices)} matrices are not in "
            f"{plan.statistics.path}: their adapters are made without statistics"
        )
    kept = plan.selection.kept
    left = [t.name for t, reason in kept if reason.startswith((_EXPERT, _NO_ADAPTER))]
    if left:
        yield f"without an adapter, though quantized: {listed(left, 1)}"
    if given.raw.revision is None and not plan.recipe.base_model:
        yield (
            f"the adapter's config names the path {given.raw.directory}: --base-model names the "
            "hub id that the backbone will have"
        )


def _refuse_nothing_to_correct(source: Source, given: Given) -> None:
    hint = "--source is the model in full precision that the backbone was made from"
    if source.encoded:
        raise UnsupportedInputError(
            f"{source.id} is itself quantized ({', '.join(source.encoded)}): what a backbone lost "
            "is not in it",
            hint=hint,
        )
    same = {shard.name: shard.header.size for shard in source.shards}
    if given.raw.directory.resolve() == source.directory.resolve() and same:
        raise UsageError(f"{given.id} is the backbone and the source: nothing differs", hint=hint)


def _selection(
    source: Source,
    given: Given,
    settings: Settings,
    found: Anatomy,
    pairs: Mapping[str, TensorSpec],
) -> Selection:
    """Every matrix that the backbone holds in codes; of one that holds none, those that a
    conversion would quantize."""
    config = source.config.content
    tensors = source.tensors
    if given.is_dense:
        present = [tensor for tensor in tensors if tensor.name in pairs]
        chosen = select(present, config, settings.include, settings.exclude, anatomy=found)
        lacking = [(t, "not in the backbone") for t in tensors if t.name not in pairs]
        return replace(chosen, kept=[*chosen.kept, *lacking])
    if settings.include:
        raise UsageError(
            f"--include: of {given.id} every quantized matrix is taken, and no other has anything "
            "to correct",
            hint="leave the option out; it is for backbones in floating point",
        )
    left_out = excluded(tensors, settings.exclude)
    matrices, kept = [], []
    names = [tensor.name for tensor in tensors]
    kinds = {name: kind_of(name, config) for name in names}
    for tensor in tensors:
        other = pairs.get(tensor.name)
        reason: str | None = None
        if other is None or not given.is_quantized(other):
            reason = "not quantized in the backbone"
        elif tensor.name in left_out:
            reason = "excluded by --exclude"
        elif is_expert(tensor.name):
            reason = _EXPERT
        elif kinds[tensor.name] == "embedding" and shared_with(tensor.name, config, names):
            reason = f"{_NO_ADAPTER}it is the output embedding too"
        elif tensor.name in found.reasons:
            reason = f"{_NO_ADAPTER}{found.reasons[tensor.name]}"
        if reason is None:
            matrices.append(tensor)
        else:
            kept.append((tensor, reason))
    if not matrices:
        emptied = any(reason == "excluded by --exclude" for _, reason in kept)
        if emptied:
            raise UsageError("--exclude leaves no matrix to adapt", hint="narrow the patterns")
        raise UnsupportedInputError(
            f"{given.id}: no matrix of it can have an adapter; the first is left out as "
            f"{kept[0][1]!r}",
            hint="is it quantized at all?",
        )
    chosen_names = [tensor.name for tensor in matrices]
    reasons = dict.fromkeys(chosen_names, "quantized in the backbone")
    return Selection(matrices, kept, {name: kinds[name] for name in chosen_names}, reasons)


def _matrix(tensor: StoredTensor, selection: Selection, found: Anatomy) -> Matrix:
    kind = selection.kinds[tensor.name]
    name = found.names.get(tensor.name)
    return Matrix(
        tensor.name,
        turned_shape((tensor.shape[0], tensor.shape[1]), kind),
        tensor.dtype,
        method="",
        bits=0,
        block_size=0,
        kind=kind,
        in_memory=name and name.removesuffix(".weight"),
    )


def _shards(source: Source) -> Sequence[PlannedShard]:
    """The source's, of which nothing is written."""
    return [PlannedShard(shard, shard.name, ()) for shard in source.shards]


def _recipe(
    settings: Settings, given: Given, statistics: Statistics | None, found: Anatomy
) -> Recipe:
    """What is not the quantizer's: that one's settings say nothing, or what they were."""
    device = choose_devices(settings.device)[0]
    stats = None if statistics is None else statistics.sha256
    plain = settled(settings, given.layout.name, methods.AUTO, device, stats, found.sha256)
    products = Variant.parse(plain.kernels).products
    how = {name: given.recipe[name] for name in _OF_LAYOUTS if name in given.recipe}
    return replace(
        plain,
        **how,
        bits=None,
        iters=1,
        order="quantize-first",
        keep="last",
        momentum=False,
        feedback=False,
        feedback_passes=1,
        scale="fixed",
        kernels=str(Variant(native=False, products=products)),
        backbone="held" if given.kept else "named",
    )


_OF_LAYOUTS = ("scale_dtype", "dense_dtype")
"""The settings that say how the tensors of our layouts are to be read."""
