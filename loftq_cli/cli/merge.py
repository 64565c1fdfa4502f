"""The command ``loftq merge``."""

from __future__ import annotations

from pathlib import Path

import click

from loftq_cli.cli import show
from loftq_cli.cli.guard import CONTEXT, guarded
from loftq_cli.cli.narrator import Narrator
from loftq_cli.cli.options import (
    choice,
    directory_argument,
    json_option,
    offline_option,
    output_option,
    quiet_option,
    revision_option,
)


@click.command(context_settings=CONTEXT)
@directory_argument
@output_option
@click.option(
    "--adapter",
    type=str,
    metavar="PATH",
    help="Directory, or adapter_model.safetensors in it, that training saved; or a hub id.  "
    "[default: DIR/loftq_init]",
)
@click.option(
    "--dtype",
    type=choice("float32", "float16", "bfloat16"),
    help="dtype of the merged matrices.  [default: what they had before the conversion]",
)
@revision_option
@offline_option
@click.option("--overwrite", is_flag=True, help="Replace an earlier merge once done.")
@json_option
@quiet_option
@guarded
def merge(
    directory: str,
    output: Path,
    adapter: str | None,
    dtype: str | None,
    revision: str | None,
    offline: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Merge a conversion and its adapter, trained or not, into an ordinary checkpoint.

    DIR is a directory or a hub id. The result loads in stock transformers, without loftq and
    without peft.

    \b
    loftq merge out/ -o merged
    loftq merge out/ -o merged --adapter trained --dtype bfloat16
    loftq merge me/llama-2-7b-loftq-2bit -o merged --adapter me/my-adapter
    """
    from loftq_cli.checkpoint.locate import locate_adapter, locate_output
    from loftq_cli.merging.merge import merge as run

    narrator = Narrator(quiet=quiet, verbose=verbose)
    place = locate_output(
        directory, revision=revision, offline=offline, everything=True, listener=narrator
    )
    trained = (
        None if adapter is None else locate_adapter(adapter, offline=offline, listener=narrator)
    )
    result = run(
        place.directory,
        output,
        adapter=trained,
        dtype=dtype,
        overwrite=overwrite,
        observer=narrator,
    )
    show.merge(result, as_json=as_json)
