"""Twins of the commands that make a conversion out of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.machine.paths import expanded
from loftq_cli.twins.places import AnyPath, located, paths

if TYPE_CHECKING:
    from loftq_cli.calibration.first import Texts
    from loftq_cli.planning.plan import Plan


def convert(
    model: AnyPath,
    output: AnyPath = "out",
    *,
    overwrite: bool = False,
    revision: str | None = None,
    offline: bool = False,
    discard_shards: bool = False,
    allow_pickle: bool = False,
    part: str | None = None,
    recipe: AnyPath | None = None,
    calibrate_text: AnyPath | Sequence[AnyPath] = (),
    moments: str | None = None,
    refine: bool = False,
    target_size: str | None = None,
    fit: str | None = None,
    fit_length: int | None = None,
    fit_batch: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Convert a checkpoint directory or hub id; the manifest as a dict.

    ``settings`` are the long options of ``loftq convert`` with underscores: bits, method, rank,
    iters, block_size, layout, scale, scale_dtype, order, svd, preset, include, exclude, embeddings,
    bits_map, rank_map, target_bpw, lora_alpha, base_model, adapter_dtype,
    dense_dtype, device, threads, seed.
    ``recipe`` is a file that holds settings, TOML or JSON, or the manifest of an earlier
    conversion; settings given here win. ``discard_shards`` deletes each shard from the hub once it
    is converted; ``allow_pickle`` reads a directory's pickled weights if it has no others.
    ``calibrate_text``, text files, has activation statistics measured first (``moments``:
    "diagonal" or "full") and kept beside the output; ``refine`` then refines the conversion on
    them, which is kept as ``output``.start; ``preset="best"`` asks for both, with full moments.
    ``target_size``, such as "3.5GB", is that of the files,
    ``fit``, such as "24GiB", the memory to fine-tune in, with windows of ``fit_length`` tokens,
    ``fit_batch`` at a time: either decides target_bpw. Resumes an unfinished conversion with the
    same settings. ``part``, such as "3/8", does only this share of the work, and returns what it
    came to; a call without it then publishes.
    """
    from loftq_cli.conversion.parts import parsed
    from loftq_cli.conversion.refined import refine_start
    from loftq_cli.conversion.run import run
    from loftq_cli.conversion.run_part import run_part
    from loftq_cli.machine.observer import Logged

    found, path, asked = _planned(
        model,
        output,
        overwrite=overwrite,
        revision=revision,
        offline=offline,
        discard_shards=discard_shards,
        allow_pickle=allow_pickle,
        part=part,
        recipe=recipe,
        calibrate_text=calibrate_text,
        moments=moments,
        refine=refine,
        sizes=(target_size, fit, fit_length, fit_batch),
        settings=settings,
    )
    if part is not None:
        return run_part(found, path, parsed(part), overwrite=overwrite, observer=Logged())
    manifest = run(found, path, overwrite=overwrite, observer=Logged()).manifest
    if asked is None or not asked.refine:
        return manifest
    return refine_start(
        found,
        path,
        expanded(output),
        asked,
        str(model),
        offline=offline,
        overwrite=overwrite,
        observer=Logged(),
    )


def plan(
    model: AnyPath,
    output: AnyPath = "out",
    *,
    overwrite: bool = False,
    revision: str | None = None,
    offline: bool = False,
    discard_shards: bool = False,
    allow_pickle: bool = False,
    part: str | None = None,
    recipe: AnyPath | None = None,
    calibrate_text: AnyPath | Sequence[AnyPath] = (),
    moments: str | None = None,
    refine: bool = False,
    target_size: str | None = None,
    fit: str | None = None,
    fit_length: int | None = None,
    fit_batch: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """What :func:`convert` would do with these arguments: what ``--dry-run --json`` prints.

    Nothing is measured, and nothing written but the small files of a hub model to the hub cache.
    """
    from loftq_cli.conversion.run import say_remarks
    from loftq_cli.machine.observer import Logged
    from loftq_cli.planning.describe import describe

    found, path, _ = _planned(
        model,
        output,
        dry_run=True,
        overwrite=overwrite,
        revision=revision,
        offline=offline,
        discard_shards=discard_shards,
        allow_pickle=allow_pickle,
        part=part,
        recipe=recipe,
        calibrate_text=calibrate_text,
        moments=moments,
        refine=refine,
        sizes=(target_size, fit, fit_length, fit_batch),
        settings=settings,
    )
    say_remarks(found, Logged())
    return describe(found, path)


def adapt(
    backbone: AnyPath,
    output: AnyPath,
    *,
    source: AnyPath | None = None,
    with_backbone: bool = False,
    calibrate_text: AnyPath | Sequence[AnyPath] = (),
    moments: str | None = None,
    revision: str | None = None,
    source_revision: str | None = None,
    offline: bool = False,
    overwrite: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Make an adapter for ``backbone``, a quantized checkpoint that exists, which was made from
    ``source``; both are directories or hub ids. The manifest as a dict.

    ``settings``: rank, rank_map, svd, include, exclude, stats, lora_alpha, base_model,
    adapter_dtype, device, threads, seed, as for :func:`convert`, and so are ``calibrate_text`` and
    ``moments``. ``with_backbone`` copies the backbone's files to the output, for the other
    functions. Resumes.
    """
    from loftq_cli.calibration import first
    from loftq_cli.conversion.prepare import asked, prepare
    from loftq_cli.conversion.run import run
    from loftq_cli.machine.observer import Logged
    from loftq_cli.settings.options import Options

    origin = None if source is None else str(source)
    given, model = asked(
        str(backbone), origin, revision, source_revision, offline=offline, kept=with_backbone
    )
    found, path = prepare(
        model,
        expanded(output),
        Options(**settings),
        overwrite=overwrite,
        texts=first.asked(paths(calibrate_text), moments, refine=False),
        backbone=given,
        observer=Logged(),
    )
    return run(found, path, overwrite=overwrite, observer=Logged()).manifest


def what_fits(
    model: AnyPath,
    memory: str | None = None,
    *,
    length: int | None = None,
    batch: int = 1,
    dtype: str = "bfloat16",
    bits: int | Sequence[int] = (),
    rank: int | Sequence[int] = (),
    layout: str | Sequence[str] = (),
    revision: str | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """What a checkpoint takes on disk, loaded and fine-tuned, for each of ``bits``, ``rank`` and
    ``layout``, from its headers, and what of that fits into ``memory``, such as "24GiB": what
    ``loftq plan --json`` prints.

    Training is with ``batch`` windows of ``length`` tokens (None: up to 2048) of a model that is
    loaded in ``dtype``. What a step takes is counted with the extra ``train``.
    """
    from loftq_cli.checkpoint.locate import locate
    from loftq_cli.checkpoint.request import Request
    from loftq_cli.machine.observer import Logged
    from loftq_cli.planning.training_memory import Training
    from loftq_cli.planning.what_fits import Grid
    from loftq_cli.planning.what_fits import what_fits as run
    from loftq_cli.settings.sizes import size_of

    request = Request(str(model), revision, offline, allow_pickle)
    room = None if memory is None else size_of("memory", memory)
    grid = Grid(
        (bits,) if isinstance(bits, int) else bits,
        (rank,) if isinstance(rank, int) else rank,
        (layout,) if isinstance(layout, str) else layout,
    )
    source = locate(request, Logged().note)
    return run(source, request, room, Training(length, batch, dtype), grid)


def calibrate(
    model: AnyPath,
    text: AnyPath | Sequence[AnyPath],
    output: AnyPath = "stats.safetensors",
    *,
    moments: str = "diagonal",
    sensitivity: bool = False,
    samples: int | None = None,
    length: int | None = None,
    device: str = "auto",
    seed: int = 0,
    revision: str | None = None,
    offline: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measure the inputs of a model's linear layers on ``text``, UTF-8 files (extra ``train``).

    ``samples`` windows of ``length`` tokens, by default up to 128 of 512; ``moments``: "diagonal"
    or "full"; ``sensitivity``: also what errors cost the model, for ``convert(target_bpw=…)``. The
    file ``output`` is what ``convert(stats=…)`` takes.
    """
    from loftq_cli.calibration.calibrate import Measuring
    from loftq_cli.calibration.calibrate import calibrate as run
    from loftq_cli.checkpoint.request import Request
    from loftq_cli.machine.observer import Logged

    return run(
        Request(str(model), revision, offline),
        expanded(output),
        paths(text),
        Measuring(samples, length, moments, device, seed, "needed" if sensitivity else "none"),
        overwrite=overwrite,
        observer=Logged(),
    )


def refine(
    directory: AnyPath = "out",
    output: AnyPath = "refined",
    *,
    source: AnyPath,
    text: AnyPath | Sequence[AnyPath],
    epochs: int | None = None,
    end_to_end: int | None = None,
    adapter: AnyPath | None = None,
    samples: int | None = None,
    length: int | None = None,
    device: str = "auto",
    seed: int = 0,
    revision: str | None = None,
    offline: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train the codes, scales and adapter of a conversion of ``source`` against it, on ``text``,
    UTF-8 files, and write a conversion of the same layout (extra ``train``).

    Block by block, ``epochs`` times through the text, then ``end_to_end`` steps of the whole model;
    None: both, the second if memory allows, or what is given of the two alone. ``adapter``: a
    trained one, to go on from. Resumes.
    """
    from loftq_cli.checkpoint.locate import locate_adapter
    from loftq_cli.machine.observer import Logged
    from loftq_cli.refinement.refine import refine as run
    from loftq_cli.refinement.settings import Refining

    wanted = Refining(samples, length, epochs, end_to_end, device, seed, None, offline)
    place = located(directory, revision, offline, everything=True)
    if adapter is not None:
        wanted = wanted.going_on(locate_adapter(adapter, offline=offline, listener=Logged()))
    return run(
        place.directory,
        expanded(output),
        str(source),
        paths(text),
        wanted,
        overwrite=overwrite,
        observer=Logged(),
    )


def _planned(
    model: AnyPath,
    output: AnyPath,
    *,
    overwrite: bool,
    revision: str | None,
    offline: bool,
    discard_shards: bool,
    allow_pickle: bool,
    part: str | None,
    recipe: AnyPath | None,
    calibrate_text: AnyPath | Sequence[AnyPath],
    moments: str | None,
    refine: bool,
    sizes: tuple[str | None, str | None, int | None, int | None],
    settings: dict[str, Any],
    dry_run: bool = False,
) -> tuple[Plan, Path, Texts | None]:
    """The plan, where it is carried out, and what is done with texts."""
    from loftq_cli.calibration import first
    from loftq_cli.checkpoint.request import Request
    from loftq_cli.conversion import parts
    from loftq_cli.conversion.prepare import prepare
    from loftq_cli.conversion.refined import start_of
    from loftq_cli.machine.observer import Logged
    from loftq_cli.planning import budget as budgets
    from loftq_cli.settings.file import options

    budget = budgets.asked(settings, *sizes)
    parts.asked(part, discard_shards=discard_shards, texts=bool(calibrate_text))
    texts, file = paths(calibrate_text), None if recipe is None else expanded(recipe)
    given = options(settings, file, measuring=bool(texts))
    asked = first.asked(texts, moments, refine=refine, preset=given.preset, dry_run=dry_run)
    found, path = prepare(
        Request(str(model), revision, offline, allow_pickle),
        start_of(expanded(output), asked),
        given,
        overwrite=overwrite,
        discard_shards=discard_shards,
        texts=asked,
        budget=budget,
        observer=Logged(),
    )
    return found, path, asked
