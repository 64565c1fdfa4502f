"""Twins of the commands that take a finished conversion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loftq_cli.machine.paths import expanded
from loftq_cli.reporting.notebook import Shown
from loftq_cli.twins.places import AnyPath, located, paths


def merge(
    directory: AnyPath = "out",
    output: AnyPath = "merged",
    *,
    adapter: AnyPath | None = None,
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
        expanded(output),
        adapter=trained,
        dtype=dtype,
        overwrite=overwrite,
        observer=Logged(),
    )


def export(
    directory: AnyPath = "out",
    output: AnyPath = "exported",
    *,
    layout: str,
    adapter: AnyPath | None = None,
    merge: bool = False,
    stats: AnyPath | None = None,
    skeleton: AnyPath | None = None,
    source: AnyPath | None = None,
    strict: bool = False,
    rounded: bool = False,
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
    ``strict`` refuses tensors that would be in 16 bits. With layout "mlx", ``rounded`` rounds
    scales and offsets that the dtype has too few bits for.
    """
    from loftq_cli.checkpoint.locate import locate_adapter
    from loftq_cli.exporting.request import Request, carry_out
    from loftq_cli.exporting.work import Wanted
    from loftq_cli.machine.observer import Logged

    place = located(directory, revision, offline, everything=True)
    trained = None
    if adapter is not None:
        trained = locate_adapter(adapter, offline=offline, listener=Logged())
    file = None if stats is None else expanded(stats)
    wanted = Wanted(layout, trained, merge, file, pad_ranks, base_model)
    held = None if skeleton is None else expanded(skeleton)
    origin = None if source is None else str(source)
    asked = Request(wanted, held, origin, strict, rounded, offline)
    return carry_out(
        place.directory, expanded(output), asked, overwrite=overwrite, observer=Logged()
    )


def import_adapter(
    directory: AnyPath = "out",
    output: AnyPath = "trained",
    *,
    adapter: AnyPath,
    revision: str | None = None,
    offline: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the ``adapter`` that mlx-lm trained on an export of the conversion in ``directory`` as
    PEFT stores one.

    ``directory`` may be a hub id, as text.
    """
    from loftq_cli.exporting.mlx.imported import import_adapter as run
    from loftq_cli.machine.observer import Logged

    place = located(directory, revision, offline, everything=True)
    return run(
        place.directory,
        expanded(output),
        adapter=expanded(adapter),
        overwrite=overwrite,
        observer=Logged(),
    )


def push(
    directory: AnyPath, repo_id: str, *, private: bool = False, revision: str | None = None
) -> dict[str, Any]:
    """Send the conversion in ``directory``, verified, to ``repo_id`` on the hub, with a model card.

    ``revision`` is the branch, made if it is not there; ``private`` is for a repository that is to
    be made.
    """
    from loftq_cli.machine.observer import Logged
    from loftq_cli.reporting.push import push as run

    say = Logged().note
    return run(expanded(directory), repo_id, private=private, revision=revision, say=say)


def inspect(
    directory: AnyPath = "out",
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

    place = located(directory, revision, offline, everything=verify)
    return Shown(run(place, verify=verify), "inspection")


def error_report(
    directory: AnyPath = "out",
    source: AnyPath | None = None,
    stats: AnyPath | None = None,
    *,
    html: AnyPath | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """How far Q + BA is from W, per layer. ``directory``, ``revision`` and ``offline`` are as for
    :func:`inspect`.

    With ``source`` (a checkpoint directory or hub id) every residual is recomputed from the packed
    bytes and the original weights, and with ``stats``, a file of activation statistics, the
    weighted ones too; VerificationError if the manifest disagrees. ``html`` is a file for the
    report as a page (extra ``report``).
    """
    from loftq_cli.reporting.report import report as run

    place = located(directory, revision, offline, everything=source is not None)
    page, named = _file(html), None if source is None else str(source)
    return Shown(run(place, named, stats, offline=offline, html=page), "residuals")


def compare(
    *directories: AnyPath, html: AnyPath | None = None, offline: bool = False
) -> dict[str, Any]:
    """Conversions of one model side by side: settings that differ, sizes, residuals by kind of
    layer, and evaluations that were kept. Each may be a hub id, as text.

    ``html`` is a file for a page with their plots overlaid (extra ``report``). Raises UsageError
    for fewer than two, InputError for conversions of different models.
    """
    from loftq_cli.reporting.report import comparison_report as run

    places = [located(directory, None, offline, everything=False) for directory in directories]
    return Shown(run(places, html=_file(html)), "comparison")


def _file(path: AnyPath | None) -> Path | None:
    return None if path is None else expanded(path)


def evaluate(
    directory: AnyPath = "out",
    *,
    text: AnyPath | Sequence[AnyPath],
    source: AnyPath | None = None,
    adapter: AnyPath | None = None,
    save: bool = False,
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
    trained one instead of the start. ``save`` keeps what is found beside the manifest, where
    :func:`compare` and :func:`push` find it.
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
    found = run(place, paths(text), named, wanted, save=save, observer=Logged())
    return Shown(found, "evaluation")
