"""The command ``loftq inspect``."""

from __future__ import annotations

import click

from loftq_cli.cli import reports
from loftq_cli.cli.guard import CONTEXT, guarded
from loftq_cli.cli.narrator import Narrator
from loftq_cli.cli.options import (
    all_option,
    directory_argument,
    json_option,
    offline_option,
    revision_option,
)


@click.command(context_settings=CONTEXT)
@directory_argument
@click.option("--verify", is_flag=True, help="Re-hash every file.")
@all_option
@revision_option
@offline_option
@json_option
@guarded
def inspect(
    directory: str,
    verify: bool,
    every: bool,
    revision: str | None,
    offline: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Show what a conversion holds: totals, bits per weight, layers, how to load it.

    DIR is a directory or a hub id.

    \b
    loftq inspect out/
    loftq inspect out/ --verify
    loftq inspect me/llama-2-7b-loftq-2bit
    """
    from loftq_cli.checkpoint.locate import locate_output
    from loftq_cli.reporting.inspect import inspect as run

    narrator = Narrator(quiet=False, verbose=verbose)
    place = locate_output(
        directory, revision=revision, offline=offline, everything=verify, listener=narrator
    )
    reports.inspection(run(place, verify=verify), as_json=as_json, every=every)
