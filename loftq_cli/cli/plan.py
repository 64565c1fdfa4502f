"""The command ``loftq plan``."""

from __future__ import annotations

import click

from loftq_cli.cli import show_fits
from loftq_cli.cli.guard import CONTEXT, guarded
from loftq_cli.cli.narrator import Narrator
from loftq_cli.cli.options import (
    choice,
    json_option,
    model_revision_option,
    offline_option,
    quiet_option,
)


@click.command(context_settings=CONTEXT)
@click.argument("model", type=str)
@click.option(
    "--memory", type=str, metavar="SIZE", help="Memory there is to fine-tune in: 24GiB, 24GB."
)
@click.option(
    "--length",
    type=int,
    metavar="N",
    help="Tokens a window.  [default: 2048, or as many as the model takes]",
)
@click.option(
    "--batch", type=int, metavar="N", default=1, show_default=True, help="Windows at a time."
)
@click.option(
    "--dtype",
    type=choice("bfloat16", "float16", "float32"),
    default="bfloat16",
    show_default=True,
    help="What the model is loaded in; 16 bits are trained with autocast.",
)
@click.option(
    "--bits",
    type=int,
    multiple=True,
    metavar="N",
    help="Widths to look at (repeatable).  [default: 2, 3, 4 and 8]",
)
@click.option(
    "--rank",
    type=int,
    multiple=True,
    metavar="N",
    help="Ranks to look at (repeatable).  [default: 16 and 64]",
)
@click.option(
    "--layout",
    type=str,
    multiple=True,
    metavar="NAME",
    help="Layouts to look at (repeatable).  [default: auto]",
)
@model_revision_option
@offline_option
@click.option(
    "--allow-pickle", is_flag=True, help="Read the headers of pickled weights, as convert."
)
@json_option
@quiet_option
@guarded
def plan(
    model: str,
    memory: str | None,
    length: int | None,
    batch: int,
    dtype: str,
    bits: tuple[int, ...],
    rank: tuple[int, ...],
    layout: tuple[str, ...],
    revision: str | None,
    offline: bool,
    allow_pickle: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Show what MODEL takes on disk, loaded and fine-tuned, and what of that fits.

    Reads headers only. MODEL is a directory or a hub id, as for convert.

    \b
    loftq plan meta-llama/Llama-2-7b --memory 24GiB
    loftq plan ./my-model --memory 16GB --length 512 --batch 4
    """
    from loftq_cli.checkpoint.locate import locate
    from loftq_cli.checkpoint.request import Request
    from loftq_cli.planning.training_memory import Training
    from loftq_cli.planning.what_fits import Grid, what_fits
    from loftq_cli.settings.sizes import size_of

    narrator = Narrator(quiet=quiet, verbose=verbose)
    room = None if memory is None else size_of("--memory", memory)
    request = Request(model, revision, offline, allow_pickle)
    found = what_fits(
        locate(request, narrator.note),
        request,
        room,
        Training(length, batch, dtype),
        Grid(bits, rank, layout),
    )
    show_fits.show(found, narrator, as_json=as_json)
