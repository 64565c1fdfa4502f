"""A function for each command: the same arguments, the same defaults, and what ``--json`` prints.

A test holds each beside its command. Everything is imported when it is called.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.machine.paths import expanded as _expanded

if TYPE_CHECKING:
    from loftq_cli.checkpoint.locate import Place
    from loftq_cli.planning.plan import Plan

_Path = str | os.PathLike[str]


def convert(
    model: _Path,
    output: _Path = "out",
    *,
    overwrite: bool = False,
    revision: str | None = None,
    offline: bool = False,
    discard_shards: bool = False,
    allow_pickle: bool = False,
    recipe: _Path | None = None,
    calibrate_text: _Path | Sequence[_Path] = (),
    moments: str | None = None,
    refine: bool = False,
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
    them, which is kept as ``output``.start. Resumes an unfinished conversion with the same
    settings.
    """
    from loftq_cli.conversion.refined import Start
    from loftq_cli.conversion.run import run
    from loftq_cli.machine.observer import Logged

    found, path = _planned(
        model,
        output,
        overwrite=overwrite,
        revision=revision,
        offline=offline,
        discard_shards=discard_shards,
        allow_pickle=allow_pickle,
        recipe=recipe,
        calibrate_text=calibrate_text,
        moments=moments,
        refine=refine,
        settings=settings,
    )
    manifest = run(found, path, overwrite=overwrite, observer=Logged()).manifest
    if not refine:
        return manifest
    start = Start(path, _expanded(output), _paths(calibrate_text), manifest["recipe"]["device"])
    return start.refine(str(model), offline=offline, overwrite=overwrite, observer=Logged())


def plan(
    model: _Path,
    output: _Path = "out",
    *,
    overwrite: bool = False,
    revision: str | None = None,
    offline: bool = False,
    discard_shards: bool = False,
    allow_pickle: bool = False,
    recipe: _Path | None = None,
    calibrate_text: _Path | Sequence[_Path] = (),
    moments: str | None = None,
    refine: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """What :func:`convert` would do with these arguments: what ``--dry-run --json`` prints.

    Nothing is measured, and nothing written but the small files of a hub model to the hub cache.
    """
    from loftq_cli.conversion.run import say_remarks
    from loftq_cli.machine.observer import Logged
    from loftq_cli.planning.describe import describe

    found, path = _planned(
        model,
        output,
        dry_run=True,
        overwrite=overwrite,
        revision=revision,
        offline=offline,
        discard_shards=discard_shards,
        allow_pickle=allow_pickle,
        recipe=recipe,
        calibrate_text=calibrate_text,
        moments=moments,
        refine=refine,
        settings=settings,
    )
    say_remarks(found, Logged())
    return describe(found, path)


def calibrate(
    model: _Path,
    text: _Path | Sequence[_Path],
    output: _Path = "stats.safetensors",
    *,
    moments: str = "diagonal",
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
    or "full". The file ``output`` is what ``convert(stats=…)`` takes.
    """
    from loftq_cli.calibration.calibrate import Measuring
    from loftq_cli.calibration.calibrate import calibrate as run
    from loftq_cli.checkpoint.request import Request
    from loftq_cli.machine.observer import Logged

    return run(
        Request(str(model), revision, offline),
        _expanded(output),
        _paths(text),
        Measuring(samples, length, moments, device, seed),
        overwrite=overwrite,
        observer=Logged(),
    )


def merge(
    directory: _Path = "out",
    output: _Path = "merged",
    *,
    adapter: _Path | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Merge a conversion and ``adapter``, trained or (None) its own, into an ordinary checkpoint.

    ``directory`` and ``adapter`` may be hub ids, as text. ``dtype`` is that of the merged matrices,
    None what they had before the conversion.
    """
    from loftq_cli.checkpoint.locate import locate_adapter
    from loftq_cli.machine.observer import Logged
    from loftq_cli.merging.merge import merge as run

    place = located(directory, revision, offline, everything=True)
    trained = None
    if adapter is not None:
        trained = locate_adapter(adapter, offline=offline, listener=Logged())
    return run(
        place.directory,
        _expanded(output),
        adapter=trained,
        dtype=dtype,
        overwrite=overwrite,
        observer=Logged(),
    )


def export(
    directory: _Path = "out",
    output: _Path = "exported",
    *,
    layout: str,
    adapter: _Path | None = None,
    merge: bool = False,
    stats: _Path | None = None,
    skeleton: _Path | None = None,
    source: _Path | None = None,
    strict: bool = False,
    pad_ranks: bool = False,
    base_model: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the codes of a conversion in another ``layout``; what it cannot hold exactly is
    refused.

    ``directory`` and ``adapter`` may be hub ids, as text. ``adapter``, which training saved, goes
    to the folder ``adapter`` of the output or, with ``merge``, into the codes, which are chosen
    anew, with error feedback under the statistics in the file ``stats``; ``pad_ranks`` gives every
    pair one rank, by zeros; ``base_model`` is what the adapters' configs call the backbone, None
    the output's path. Layout "gguf" is written into the ``skeleton``, a GGUF file of the model in
    floating point, which is of the model ``source`` if it is not of the conversion's own values;
    ``strict`` refuses tensors that would be in 16 bits.
    """
    from loftq_cli.checkpoint.locate import locate_adapter
    from loftq_cli.exporting.export import export as run
    from loftq_cli.exporting.gguf.export import export_gguf, settled
    from loftq_cli.exporting.work import Wanted
    from loftq_cli.machine.observer import Logged

    place = located(directory, revision, offline, everything=True)
    trained = None
    if adapter is not None:
        trained = locate_adapter(adapter, offline=offline, listener=Logged())
    file = None if stats is None else _expanded(stats)
    wanted = Wanted(layout, trained, merge, file, pad_ranks, base_model)
    held = None if skeleton is None else _expanded(skeleton)
    origin = None if source is None else str(source)
    skeletal = settled(wanted, held, origin, strict=strict, offline=offline)
    target, observer = _expanded(output), Logged()
    if skeletal is None:
        return run(place.directory, target, wanted, overwrite=overwrite, observer=observer)
    return export_gguf(place.directory, target, skeletal, overwrite=overwrite, observer=observer)


def push(
    directory: _Path, repo_id: str, *, private: bool = False, revision: str | None = None
) -> dict[str, Any]:
    """Send the conversion in ``directory``, verified, to ``repo_id`` on the hub, with a model card.

    ``revision`` is the branch, made if it is not there; ``private`` is for a repository that is to
    be made.
    """
    from loftq_cli.machine.observer import Logged
    from loftq_cli.reporting.push import push as run

    say = Logged().note
    return run(_expanded(directory), repo_id, private=private, revision=revision, say=say)


def inspect(
    directory: _Path = "out",
    *,
    verify: bool = False,
    revision: str | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """What a conversion holds. ``verify`` re-hashes every file.

    ``directory`` may be a hub id, as text, at ``revision``; ``offline`` uses only what is in the
    hub cache. Raises InputError if it is no finished conversion or was altered.
    """
    from loftq_cli.reporting.inspect import inspect as run

    return run(located(directory, revision, offline, everything=verify), verify=verify)


def error_report(
    directory: _Path = "out",
    source: _Path | None = None,
    stats: _Path | None = None,
    *,
    revision: str | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """How far Q + BA is from W, per layer. ``directory``, ``revision`` and ``offline`` are as for
    :func:`inspect`.

    With ``source`` (a checkpoint directory or hub id) every residual is recomputed from the packed
    bytes and the original weights, and with ``stats``, a file of activation statistics, the
    weighted ones too; VerificationError if the manifest disagrees.
    """
    from loftq_cli.reporting.residuals import error_report as run

    place = located(directory, revision, offline, everything=source is not None)
    return run(place, None if source is None else str(source), stats, offline=offline)


def evaluate(
    directory: _Path = "out",
    *,
    text: _Path | Sequence[_Path],
    source: _Path | None = None,
    adapter: _Path | None = None,
    samples: int | None = None,
    length: int | None = None,
    device: str = "auto",
    seed: int = 0,
    revision: str | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """Perplexity of a conversion, or any checkpoint, on ``text``, UTF-8 files (extra ``train``).

    With ``source``, the original, also its perplexity, ``kl`` and ``top1``; of models that are no
    causal language models ``cosine`` and ``relative_error`` of hidden states. ``adapter``: a
    trained one instead of the start.
    """
    from loftq_cli.checkpoint.locate import locate_adapter
    from loftq_cli.evaluation.evaluate import Evaluating
    from loftq_cli.evaluation.evaluate import evaluate as run
    from loftq_cli.machine.observer import Logged

    place = located(directory, revision, offline, everything=True)
    trained = None
    if adapter is not None:
        trained = locate_adapter(adapter, offline=offline, listener=Logged())
    wanted = Evaluating(samples, length, device, seed, trained, offline)
    named = None if source is None else str(source)
    return run(place, _paths(text), named, wanted, observer=Logged())


def refine(
    directory: _Path = "out",
    output: _Path = "refined",
    *,
    source: _Path,
    text: _Path | Sequence[_Path],
    epochs: int | None = None,
    end_to_end: int | None = None,
    adapter: _Path | None = None,
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
    None: the whole model if memory allows, else its blocks once. ``adapter``: a trained one, to go
    on from. Resumes.
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
        _expanded(output),
        str(source),
        _paths(text),
        wanted,
        overwrite=overwrite,
        observer=Logged(),
    )


def _planned(
    model: _Path,
    output: _Path,
    *,
    overwrite: bool,
    revision: str | None,
    offline: bool,
    discard_shards: bool,
    allow_pickle: bool,
    recipe: _Path | None,
    calibrate_text: _Path | Sequence[_Path],
    moments: str | None,
    refine: bool,
    settings: Mapping[str, Any],
    dry_run: bool = False,
) -> tuple[Plan, Path]:
    from loftq_cli.calibration import first
    from loftq_cli.checkpoint.request import Request
    from loftq_cli.conversion.prepare import prepare
    from loftq_cli.conversion.refined import start_of
    from loftq_cli.machine.observer import Logged
    from loftq_cli.settings.file import options

    texts = _paths(calibrate_text)
    file, path = None if recipe is None else _expanded(recipe), _expanded(output)
    return prepare(
        Request(str(model), revision, offline, allow_pickle),
        start_of(path, texts) if refine else path,
        options(settings, file, measuring=bool(texts)),
        overwrite=overwrite,
        discard_shards=discard_shards,
        texts=first.asked(texts, moments, dry_run=dry_run),
        observer=Logged(),
    )


def _paths(given: _Path | Sequence[_Path]) -> list[Path]:
    several = [given] if isinstance(given, (str, os.PathLike)) else given
    return [_expanded(path) for path in several]


def located(directory: _Path, revision: str | None, offline: bool, *, everything: bool) -> Place:
    """Where the conversion ``directory``, a path or a hub id, lies."""
    from loftq_cli.checkpoint.locate import locate_output
    from loftq_cli.machine.observer import Logged

    return locate_output(
        directory, revision=revision, offline=offline, everything=everything, listener=Logged()
    )
