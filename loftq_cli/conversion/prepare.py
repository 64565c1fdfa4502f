"""From a model's name to the plan of its conversion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from loftq_cli.calibration import first
from loftq_cli.calibration.first import Texts
from loftq_cli.checkpoint.differences import differences, differing_settings
from loftq_cli.checkpoint.locate import is_path, locate
from loftq_cli.checkpoint.request import Request
from loftq_cli.conversion.pin import pinned
from loftq_cli.conversion.refined import cost_note
from loftq_cli.conversion.room import check_resources
from loftq_cli.conversion.subject import subject
from loftq_cli.conversion.workspace import ConversionWorkspace
from loftq_cli.errors import OutputConflictError, UsageError
from loftq_cli.machine.observer import Observer
from loftq_cli.machine.paths import check_output_path, real_path
from loftq_cli.planning import target
from loftq_cli.planning.adapted import make_adapted_plan
from loftq_cli.planning.budget import Budget
from loftq_cli.planning.given import Given, open_given
from loftq_cli.planning.make import make_plan
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.remarks import remarks
from loftq_cli.settings.kinds import flag
from loftq_cli.settings.options import Options
from loftq_cli.settings.table import OF_ADAPTERS, Settings
from loftq_cli.statistics.file import statistics_for
from loftq_cli.statistics.statistics import Statistics

Planned = Callable[[Settings, Statistics | None], Plan]
"""A plan, given the settings and the statistics."""

SETTLED = ("widths", "layout", "layout_fallback")
"""Fields of a recipe that may not be known yet when it is first planned."""


@dataclass(frozen=True)
class Backbone:
    """A backbone that exists, as it was asked for. ``kept``: its files are to be in the output."""

    request: Request
    kept: bool

    def check(self, options: Options) -> None:
        """Raise UsageError for settings that are a quantizer's."""
        strange = [name for name in options.given if name not in OF_ADAPTERS]
        if strange:
            raise UsageError(
                f"{flag(strange[0])} is for quantizing, and the backbone is quantized already",
                hint=f"leave it out; there are {', '.join(map(flag, OF_ADAPTERS))}",
            )

    def opened(self, observer: Observer) -> Given:
        """Its files, on disk. Raises InputError, EnvironmentFailure."""
        return open_given(self.request, observer.note, kept=self.kept)


def asked(
    backbone: str,
    source: str | None,
    revision: str | None = None,
    source_revision: str | None = None,
    *,
    offline: bool = False,
    kept: bool = False,
) -> tuple[Backbone, Request]:
    """The backbone and its source, as they are named. Raises UsageError without a source."""
    if not source:
        raise UsageError(
            "--source is missing: without the original there is nothing to correct",
            hint="name the model in full precision that the backbone was made from",
        )
    given = Backbone(Request(backbone, revision, offline), kept)
    return given, Request(source, source_revision, offline)


def prepare(
    request: Request,
    output: str | Path,
    options: Options,
    *,
    overwrite: bool = False,
    discard_shards: bool = False,
    texts: Texts | None = None,
    backbone: Backbone | None = None,
    budget: Budget | None = None,
    observer: Observer,
) -> tuple[Plan, Path]:
    """The plan of a conversion and the absolute output path; nothing is written but the small
    files of a hub model to the hub cache, and statistics of ``texts``, which are measured now
    unless they lie beside the output already.

    ``backbone``: one that exists, and only adapters are to be made for it.

    Unfinished work goes on with the commit that it was begun with, unless ``overwrite``.
    ``discard_shards``: shards that are not in the hub cache pass through the partial directory.

    A ``budget`` decides the target of stored bits that ``options`` leave open.

    If nobody chose the number of threads, it is that of unfinished work with these settings, or
    (unless it is to be overwritten) of an output with them: another would change the bytes.

    Raises UsageError for bad settings or an output inside the input, InputError for a bad source,
    EnvironmentFailure if the hub or the device cannot be reached.
    """
    settings = options.resolve()
    if backbone is not None:
        backbone.check(options)
    if texts is not None:
        _check_texts(settings, discard_shards=discard_shards, allow_pickle=request.allow_pickle)
    if discard_shards and is_path(request.model):
        raise UsageError(
            f"--discard-shards is for models from the hub; the files of {request.model} are never "
            "deleted",
            hint="leave the option out",
        )
    workspace = ConversionWorkspace(real_path(Path(output)))
    request = replace(
        request,
        pinned=None if overwrite else pinned(workspace, request.model, request.revision),
        passing=workspace.passing if discard_shards else None,
    )
    source = locate(request, observer.note)
    path = check_output_path(Path(output), source.directory)
    statistics = None if settings.stats is None else statistics_for(source, settings.stats)
    if backbone is None:
        planned: Planned = partial(make_plan, source)
    else:
        given = backbone.opened(observer)
        check_output_path(Path(output), given.raw.directory)
        planned = partial(make_adapted_plan, source, given)
    plan = planned(settings, statistics)
    if budget is not None:
        options = options.having(target_bpw=budget.target(plan))
        settings = options.resolve()
        plan = planned(settings, statistics)
        observer.note(f"{budget.said}: {settings.target_bpw:.4f} stored bits per weight")
    target.check(plan)
    if texts is not None and texts.refine:
        observer.note(cost_note(plan))
    if texts is not None:
        plan = _measured_first(
            plan, planned, settings, path, texts, overwrite=overwrite, observer=observer
        )
    if settings.threads is None:
        plan = _with_earlier_threads(plan, workspace, overwrite)
    return replace(plan, remarks=remarks(plan, options, measuring=texts is not None)), path


def _measured_first(
    plan: Plan,
    planned: Planned,
    settings: Settings,
    path: Path,
    texts: Texts,
    *,
    overwrite: bool,
    observer: Observer,
) -> Plan:
    """The plan with statistics of ``texts``, measured now unless they are there. Raises
    OutputConflictError or EnvironmentFailure before that for what could not be converted then."""
    if texts.dry_run and texts.own:
        observer.note("the model writes its text first; this plan is made without it")
        return plan
    source, device = plan.source, str(plan.device)
    read = first.read(source, path, texts, device=device, observer=observer)
    sensitivity = settings.target_bpw is not None
    statistics = first.found(
        source, path, read, texts.moments, sensitivity=sensitivity, overwrite=overwrite
    )
    if statistics is None and texts.dry_run:
        observer.note("the statistics are measured first; this plan is made without them")
        return plan
    if statistics is None:
        workspace = ConversionWorkspace(path)
        if not overwrite:
            _refuse_beforehand(plan, workspace)
        check_resources(plan, workspace)
        moments = texts.moments or first.moments_for(plan)
        statistics = first.measured(
            source,
            path,
            read,
            moments,
            sensitivity=sensitivity,
            device=device,
            observer=observer,
        )
    return planned(settings, statistics)


def _with_earlier_threads(plan: Plan, workspace: ConversionWorkspace, overwrite: bool) -> Plan:
    wanted = plan.recipe.as_dict()
    for held, _ in workspace.held(finished=not overwrite):
        differing = differing_settings(held, wanted)
        if "threads" in differing and differing <= {"threads", *SETTLED}:
            return replace(plan, recipe=replace(plan.recipe, threads=held["threads"]))
    return plan


def _check_texts(settings: Settings, *, discard_shards: bool, allow_pickle: bool) -> None:
    """Raise UsageError if statistics cannot be measured first."""
    if settings.stats is not None:
        raise UsageError(f"--stats and {first.OPTION} exclude each other")
    for given, option, why in (
        (discard_shards, "--discard-shards", "running the model needs all of its shards"),
        (allow_pickle, "--allow-pickle", "the model is run by transformers, from safetensors only"),
    ):
        if given:
            raise UsageError(
                f"{option} and {first.OPTION} exclude each other: {why}",
                hint="measure where that is possible, and give the file with --stats",
            )


def _refuse_beforehand(plan: Plan, workspace: ConversionWorkspace) -> None:
    """Raise OutputConflictError if what is there cannot be of this conversion, whatever the
    statistics will be: measuring them takes long."""
    if workspace.complete_output() is None:
        workspace.refuse_other_output(overwrite=False)
    wanted = {**plan.recipe.as_dict(), "stats": "to be measured"}
    for held, _ in workspace.held():
        differing = differing_settings(held, wanted)
        if held.get("stats") is None or not differing <= {"stats", "threads", *SETTLED}:
            if held.get("stats") is not None:
                held = {**held, "stats": wanted["stats"]}  # they may be the same in the end
            there = replace(subject(plan), recipe=held)
            now = replace(subject(plan), recipe=wanted)
            raise OutputConflictError(
                f"{workspace.final}: there is another conversion: {differences(there, now)}"
            )
