"""The command ``loftq refine``."""

from __future__ import annotations

from pathlib import Path

import click

from loftq_cli.cli import show
from loftq_cli.cli.guard import CONTEXT, guarded
from loftq_cli.cli.narrator import Narrator
from loftq_cli.cli.options import (
    device_option,
    directory_argument,
    json_option,
    length_option,
    log_option,
    offline_option,
    output_option,
    quiet_option,
    revision_option,
    seed_option,
    text_option,
)
from loftq_cli.cli.together import together


@click.command(context_settings=CONTEXT)
@directory_argument
@click.option(
    "--source",
    required=True,
    type=str,
    metavar="MODEL",
    help="The model that was converted, a directory or hub id.",
)
@text_option("Text to train on, UTF-8 (repeatable).")
@output_option
@click.option(
    "--epochs",
    type=int,
    help="Times that each block is trained on the text; 0: none.  [default: 1, or 0 if "
    "--end-to-end is given]",
)
@click.option(
    "--end-to-end",
    type=int,
    metavar="STEPS",
    help="Steps of the whole model, after its blocks.  [default: 48 if memory allows, or 0 if "
    "--epochs is given]",
)
@click.option(
    "--adapter",
    type=str,
    metavar="PATH",
    help="What training saved, to go on from.  [default: DIR/loftq_init]",
)
@click.option(
    "--samples",
    type=int,
    help="Windows of text, of which a tenth is held out.  [default: all, up to 288]",
)
@length_option
@device_option
@seed_option
@revision_option
@offline_option
@click.option("--overwrite", is_flag=True, help="Replace an earlier conversion once done.")
@click.option("--dry-run", is_flag=True, help="Check everything, and write nothing.")
@json_option
@quiet_option
@log_option
@guarded
def refine(
    directory: str,
    source: str,
    texts: tuple[Path, ...],
    output: Path,
    epochs: int | None,
    end_to_end: int | None,
    adapter: str | None,
    samples: int | None,
    length: int | None,
    device: str,
    seed: int,
    revision: str | None,
    offline: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    log_file: Path | None,
    verbose: bool,
) -> None:
    """Train a conversion's codes, scales and adapter against its original.

    DIR is a finished conversion, a directory or a hub id. The result is a conversion of the same
    layout, widths and ranks. Takes text and time, and makes up for about half of what closed forms
    leave at 2 bits. Needs the extra [train].

    \b
    loftq refine out/ --source ./my-model --text notes.txt -o refined
    loftq refine out/ --source ./my-model --text notes.txt -o refined --epochs 2
    """
    from loftq_cli.checkpoint.locate import locate_adapter, locate_output
    from loftq_cli.refinement.refine import refine as run
    from loftq_cli.refinement.settings import Refining

    with together() as world:
        narrator = Narrator(quiet=quiet or not world.first, verbose=verbose, log_file=log_file)
        wanted = Refining(samples, length, epochs, end_to_end, device, seed, None, offline)
        with world.in_turn("conversion"):
            place = locate_output(
                directory, revision=revision, offline=offline, everything=True, listener=narrator
            )
            if adapter is not None:
                found = locate_adapter(adapter, offline=offline, listener=narrator)
                wanted = wanted.going_on(found)
        result = run(
            place.directory,
            output,
            source,
            texts,
            wanted,
            overwrite=overwrite,
            dry_run=dry_run,
            observer=narrator,
            world=world,
        )
    if world.first:
        show.refinement(result, as_json=as_json)
