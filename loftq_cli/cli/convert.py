"""The command ``loftq convert``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loftq_cli.cli import console, show, show_plan
from loftq_cli.cli.guard import CONTEXT, ExpandedPath, guarded
from loftq_cli.cli.narrator import Narrator
from loftq_cli.cli.options import (
    calibrate_text_option,
    choice,
    json_option,
    log_option,
    model_revision_option,
    moments_option,
    offline_option,
    quiet_option,
    setting_options,
)
from loftq_cli.settings.table import PRESETS

if TYPE_CHECKING:
    from loftq_cli.planning.plan import Plan


@click.command(context_settings=CONTEXT)
@click.argument("model", type=str)
@click.option(
    "-o",
    "--output",
    default="out",
    show_default=True,
    type=ExpandedPath(),
    help="Directory to write.",
)
@setting_options("how")
@click.option(
    "--preset",
    type=choice(*PRESETS),
    help="Defaults to start from; paper is what the LoftQ reference code does, best measures full "
    "moments of --calibrate-text, takes 20 steps and refines.  [default: default]",
)
@click.option(
    "--recipe",
    "recipe_file",
    type=ExpandedPath(),
    metavar="FILE",
    help="Take options from a TOML or JSON file, or the manifest of an earlier conversion.  "
    "What is given here wins.",
)
@click.option(
    "--save-recipe",
    type=ExpandedPath(),
    metavar="FILE",
    help="Write all options as they were resolved to a TOML file.",
)
@click.option(
    "--target-size",
    type=str,
    metavar="SIZE",
    help="Choose the widths as --target-bpw does, for files of backbone and adapter of this size: "
    "3.5GB.",
)
@click.option(
    "--fit",
    type=str,
    metavar="SIZE",
    help="Choose the widths as --target-bpw does, for fine-tuning in this memory: 24GiB.  Needs "
    "the extra [train]; see `loftq plan`.",
)
@click.option(
    "--fit-length",
    type=int,
    metavar="N",
    help="Tokens a window, for --fit.  [default: 2048, or as many as the model takes]",
)
@click.option(
    "--fit-batch", type=int, metavar="N", help="Windows at a time, for --fit.  [default: 1]"
)
@setting_options("which")
@setting_options("statistics")
@calibrate_text_option
@moments_option
@click.option(
    "--refine",
    "refining",
    is_flag=True,
    help="Refine what was converted on that text, as `loftq refine` does; the start stays at "
    "OUTPUT.start.",
)
@setting_options("where")
@model_revision_option
@offline_option
@click.option(
    "--allow-pickle",
    is_flag=True,
    help="Read pickled weights (pytorch_model.bin) if a directory has no others; nothing in "
    "them is run.",
)
@click.option(
    "--discard-shards",
    is_flag=True,
    help="Delete each shard from the hub once it is converted: room for two of them is enough.  "
    "What is in the hub cache already stays.",
)
@click.option(
    "--part",
    type=str,
    metavar="I/N",
    help="Do only this share of the work, for N processes that need not know of each other; the "
    "command without it then publishes.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output once done.")
@click.option("--dry-run", is_flag=True, help="Show the plan; read headers, write nothing.")
@json_option
@quiet_option
@log_option
@guarded
def convert(
    model: str,
    output: Path,
    revision: str | None,
    offline: bool,
    discard_shards: bool,
    allow_pickle: bool,
    part: str | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    log_file: Path | None,
    verbose: bool,
    recipe_file: Path | None,
    save_recipe: Path | None,
    texts: tuple[Path, ...],
    moments: str | None,
    refining: bool,
    target_size: str | None,
    fit: str | None,
    fit_length: int | None,
    fit_batch: int | None,
    **settings: Any,
) -> None:
    """Convert MODEL, a checkpoint directory or a hub id.

    A path that starts with ., / or ~ (or exists) is a directory, anything else a hub id. Running
    the same command again resumes an unfinished conversion.

    \b
    loftq convert meta-llama/Llama-2-7b --bits 2 --rank 64 --iters 5
    loftq convert ./my-model -o quantized --bits 4 --dry-run
    """
    from loftq_cli.calibration import first
    from loftq_cli.checkpoint.request import Request
    from loftq_cli.conversion import parts, ranks, refined
    from loftq_cli.conversion.prepare import prepare
    from loftq_cli.conversion.run import run
    from loftq_cli.conversion.run_part import run_part
    from loftq_cli.machine.group import Group
    from loftq_cli.planning import budget as budgets
    from loftq_cli.settings import file as recipes

    place = ranks.asked(part=part is not None, discard_shards=discard_shards, texts=bool(texts))
    if place is not None and place.rank:
        console.called(f"loftq[{place.rank}]")
        quiet = True  # rank 0 speaks for all
        if dry_run:
            return
    narrator = Narrator(quiet=quiet, verbose=verbose, log_file=log_file)
    budget = budgets.asked(settings, target_size, fit, fit_length, fit_batch)
    options = recipes.options(settings, recipe_file, measuring=bool(texts))
    if save_recipe is not None:
        recipes.check_writable(save_recipe, dry_run=dry_run)
    share = parts.asked(part, discard_shards=discard_shards, texts=bool(texts))
    asked = first.asked(texts, moments, refine=refining, preset=options.preset, dry_run=dry_run)
    refining = asked is not None and asked.refine
    with ExitStack() as stack:
        group = None if place is None or dry_run else stack.enter_context(Group(place))
        if group is not None:
            ranks.take_turn(group)
        plan, path = prepare(
            Request(model, revision, offline, allow_pickle),
            refined.start_of(output, asked),
            options,
            overwrite=overwrite,
            discard_shards=discard_shards,
            texts=asked,
            budget=budget,
            observer=narrator,
        )
        if dry_run:
            _show(plan, path, narrator, as_json=as_json)
            return
        if share is not None:
            done = run_part(plan, path, share, overwrite=overwrite, observer=narrator)
            show.part(done, str(output), as_json=as_json)
            return
        helpers = None
        if group is not None:
            helpers = ranks.Helpers(group, ranks.introduce(group, plan))
        if group is not None and group.place.rank:
            ranks.assist(group, plan, path, narrator)
            return
        outcome = run(plan, path, overwrite=overwrite, observer=narrator, helpers=helpers)
    if save_recipe is not None:
        recipes.save(save_recipe, outcome.manifest["recipe"])
    if outcome.nothing_to_do:
        narrator.note(f"nothing to do: {path if refining else output} is complete and verified")
    manifest = outcome.manifest
    if asked is not None and refining:
        manifest = refined.refine_start(
            plan,
            path,
            output,
            asked,
            model,
            offline=offline,
            overwrite=overwrite,
            observer=narrator,
        )
    again = outcome.nothing_to_do and not refining
    show.outcome(manifest, str(output), again=again, as_json=as_json)


def _show(plan: Plan, path: Path, narrator: Narrator, *, as_json: bool) -> None:
    from loftq_cli.conversion.run import say_remarks
    from loftq_cli.planning.describe import describe

    say_remarks(plan, narrator)
    show_plan.plan(describe(plan, path), as_json=as_json)
