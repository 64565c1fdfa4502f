"""The command ``loftq import-adapter``."""

from __future__ import annotations

from pathlib import Path

import click

from loftq_cli.cli import show
from loftq_cli.cli.guard import CONTEXT, ExpandedPath, guarded
from loftq_cli.cli.narrator import Narrator
from loftq_cli.cli.options import (
    directory_argument,
    json_option,
    offline_option,
    output_option,
    quiet_option,
    revision_option,
)


@click.command("import-adapter", context_settings=CONTEXT)
@directory_argument
@output_option
@click.option(
    "--adapter",
    required=True,
    type=ExpandedPath(),
    metavar="PATH",
    help="Directory that mlx_lm.lora saved to (its --adapter-path), or adapters.safetensors in it.",
)
@revision_option
@offline_option
@click.option("--overwrite", is_flag=True, help="Replace an earlier adapter once done.")
@json_option
@quiet_option
@guarded
def import_adapter(
    directory: str,
    output: Path,
    adapter: Path,
    revision: str | None,
    offline: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Convert an adapter that mlx-lm trained to PEFT's format.

    DIR is the conversion, a directory or a hub id, that `loftq export --layout mlx` exported. Every
    command that takes --adapter takes the result, and so does PEFT.

    \b
    loftq import-adapter out/ -o trained --adapter adapters
    loftq merge out/ -o merged --adapter trained
    """
    from loftq_cli.checkpoint.locate import locate_output
    from loftq_cli.exporting.mlx.imported import import_adapter as run

    narrator = Narrator(quiet=quiet, verbose=verbose)
    place = locate_output(
        directory, revision=revision, offline=offline, everything=True, listener=narrator
    )
    result = run(place.directory, output, adapter=adapter, overwrite=overwrite, observer=narrator)
    show.imported(result, as_json=as_json)
