"""The command ``loftq push``."""

from __future__ import annotations

from pathlib import Path

import click

from loftq_cli.cli import show
from loftq_cli.cli.guard import CONTEXT, ExpandedPath, guarded
from loftq_cli.cli.narrator import Narrator
from loftq_cli.cli.options import json_option


@click.command(context_settings=CONTEXT)
@click.argument("directory", type=ExpandedPath(), metavar="DIR")
@click.argument("repo_id", type=str, metavar="REPO_ID")
@click.option("--private", is_flag=True, help="Make the repository private, if it is to be made.")
@click.option("--revision", type=str, help="Branch to send to, made if it is not there.")
@json_option
@guarded
def push(
    directory: Path,
    repo_id: str,
    private: bool,
    revision: str | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Send the conversion in DIR to REPO_ID on the hub, with a model card.

    DIR is verified first. Running the same command again goes on where it was stopped.

    \b
    loftq push out/ me/llama-2-7b-loftq-2bit
    loftq push out/ me/llama-2-7b-loftq-2bit --private --revision rank-64
    """
    from loftq_cli.reporting.push import push as run

    narrator = Narrator(quiet=False, verbose=verbose)
    result = run(directory, repo_id, private=private, revision=revision, say=narrator.note)
    show.push(result, as_json=as_json)
