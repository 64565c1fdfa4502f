"""The command ``loftq adapt``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loftq_cli.cli import show, show_plan
from loftq_cli.cli.guard import CONTEXT, guarded
from loftq_cli.cli.narrator import Narrator
from loftq_cli.cli.options import (
    calibrate_text_option,
    json_option,
    log_option,
    moments_option,
    offline_option,
    output_option,
    quiet_option,
    settings_options,
)
from loftq_cli.settings.table import OF_ADAPTERS

_TOLD = {
    "include": "Of a BACKBONE in floating point: adapt these tensors as well (glob, repeatable).",
    "exclude": "No adapter for these tensors (glob, repeatable).",
    "base_model": "base_model_name_or_path of the adapter.  [default: BACKBONE]",
}


@click.command(context_settings=CONTEXT)
@click.argument("backbone", type=str)
@click.option(
    "--source",
    type=str,
    metavar="MODEL",
    help="The model in full precision that BACKBONE was made from, a directory or hub id.  "
    "[required]",
)
@output_option
@click.option(
    "--with-backbone",
    is_flag=True,
    help="Copy the backbone's files, too: what the other commands take.",
)
@settings_options(OF_ADAPTERS, _TOLD)
@calibrate_text_option
@moments_option
@click.option("--revision", type=str, help="Branch, tag or commit of BACKBONE on the hub.")
@click.option("--source-revision", type=str, help="Branch, tag or commit of MODEL on the hub.")
@offline_option
@click.option("--overwrite", is_flag=True, help="Replace an existing output once done.")
@click.option("--dry-run", is_flag=True, help="Show the plan; write nothing.")
@json_option
@quiet_option
@log_option
@guarded
def adapt(
    backbone: str,
    source: str | None,
    output: Path,
    with_backbone: bool,
    texts: tuple[Path, ...],
    moments: str | None,
    revision: str | None,
    source_revision: str | None,
    offline: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    log_file: Path | None,
    **settings: Any,
) -> None:
    """Make an adapter for BACKBONE, a quantized checkpoint that exists.

    BACKBONE is a directory or a hub id: GPTQ, AWQ, bitsandbytes, compressed-tensors, AutoRound,
    FP8, a conversion, or a checkpoint in floating point. The adapter makes up for what it lost of
    the model it was made from. Running the same command again resumes.

    \b
    loftq adapt ./model-gptq --source ./my-model --rank 64 -o adapter
    loftq adapt ./model-gptq --source ./my-model --stats FILE -o adapted --with-backbone
    """
    from loftq_cli.calibration import first
    from loftq_cli.conversion.prepare import asked, prepare
    from loftq_cli.conversion.ranks import refuse_several
    from loftq_cli.conversion.run import run, say_remarks
    from loftq_cli.planning.describe import describe
    from loftq_cli.settings.options import Options

    refuse_several("adapt")
    narrator = Narrator(quiet=quiet, verbose=verbose, log_file=log_file)
    given, model = asked(
        backbone, source, revision, source_revision, offline=offline, kept=with_backbone
    )
    plan, path = prepare(
        model,
        output,
        Options(**settings),
        overwrite=overwrite,
        texts=first.asked(texts, moments, refine=False, dry_run=dry_run),
        backbone=given,
        observer=narrator,
    )
    if dry_run:
        say_remarks(plan, narrator)
        show_plan.plan(describe(plan, path), as_json=as_json)
        return
    outcome = run(plan, path, overwrite=overwrite, observer=narrator)
    if outcome.nothing_to_do:
        narrator.note(f"nothing to do: {output} is complete and verified")
    show.outcome(outcome.manifest, str(output), again=outcome.nothing_to_do, as_json=as_json)
