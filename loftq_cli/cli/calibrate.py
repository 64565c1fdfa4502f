"""The command ``loftq calibrate``."""

from __future__ import annotations

from pathlib import Path

import click

from loftq_cli.cli import show
from loftq_cli.cli.guard import CONTEXT, ExpandedPath, guarded
from loftq_cli.cli.narrator import Narrator
from loftq_cli.cli.options import (
    choice,
    device_option,
    json_option,
    length_option,
    log_option,
    model_revision_option,
    offline_option,
    quiet_option,
    samples_option,
    seed_option,
    text_option,
)
from loftq_cli.cli.together import together


@click.command(context_settings=CONTEXT)
@click.argument("model", type=str)
@text_option("Text to run the model on, UTF-8 (repeatable).")
@click.option(
    "-o",
    "--output",
    default="stats.safetensors",
    show_default=True,
    type=ExpandedPath(),
    metavar="FILE",
    help="File to write.",
)
@click.option(
    "--moments",
    type=choice("diagonal", "full"),
    default="diagonal",
    show_default=True,
    help="Mean squares of the inputs, or the whole matrix of their products.",
)
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Also what an error of each matrix costs the model: --target-bpw goes by it.",
)
@samples_option
@length_option
@device_option
@seed_option
@model_revision_option
@offline_option
@click.option("--overwrite", is_flag=True, help="Replace an earlier file of statistics once done.")
@json_option
@quiet_option
@log_option
@guarded
def calibrate(
    model: str,
    texts: tuple[Path, ...],
    output: Path,
    moments: str,
    sensitivity: bool,
    samples: int | None,
    length: int | None,
    device: str,
    seed: int,
    revision: str | None,
    offline: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    log_file: Path | None,
    verbose: bool,
) -> None:
    """Measure the inputs of MODEL's linear layers while it reads text.

    MODEL is a checkpoint directory or a hub id, as for convert. The file weights the error that
    convert makes small. Needs the extra [train].

    \b
    loftq calibrate ./my-model --text notes.txt -o stats.safetensors
    loftq calibrate ./my-model --text a.txt --text b.txt --moments full --samples 64
    loftq calibrate ./my-model --text notes.txt --moments full --sensitivity
    """
    from loftq_cli.calibration.calibrate import Measuring
    from loftq_cli.calibration.calibrate import calibrate as run
    from loftq_cli.checkpoint.request import Request

    with together() as world:
        narrator = Narrator(quiet=quiet or not world.first, verbose=verbose, log_file=log_file)
        result = run(
            Request(model, revision, offline),
            output,
            texts,
            Measuring(samples, length, moments, device, seed, "needed" if sensitivity else "none"),
            overwrite=overwrite,
            observer=narrator,
            world=world,
        )
    if world.first:
        show.calibration(result, as_json=as_json)
