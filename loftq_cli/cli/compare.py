"""The command ``loftq compare``."""

from __future__ import annotations

from pathlib import Path

import click

from loftq_cli.cli import reports
from loftq_cli.cli.guard import CONTEXT, ExpandedPath, guarded
from loftq_cli.cli.narrator import Narrator
from loftq_cli.cli.options import json_option, offline_option


@click.command(context_settings=CONTEXT)
@click.argument("directories", nargs=-1, required=True, metavar="DIR DIR...")
@click.option(
    "--html",
    type=ExpandedPath(),
    metavar="FILE",
    help="Write a page with their plots overlaid as well (extra [report]).",
)
@offline_option
@json_option
@guarded
def compare(
    directories: tuple[str, ...], html: Path | None, offline: bool, as_json: bool, verbose: bool
) -> None:
    """Show conversions of one model side by side.

    Settings that differ, sizes, residuals by kind of layer, and what `loftq evaluate --save` found.
    Each DIR is a directory or a hub id.

    \b
    loftq compare out-2-bit out-3-bit
    loftq compare out-2-bit out-3-bit --html compared.html
    """
    from loftq_cli.checkpoint.locate import locate_output
    from loftq_cli.reporting.report import comparison_report as run

    narrator = Narrator(quiet=False, verbose=verbose)
    places = [
        locate_output(directory, offline=offline, everything=False, listener=narrator)
        for directory in directories
    ]
    reports.comparison(run(places, html=html), as_json=as_json)
    if html is not None:
        narrator.note(f"wrote {html}")
