"""The command ``loftq error-report``."""

from __future__ import annotations

from pathlib import Path

import click

from loftq_cli.cli import reports
from loftq_cli.cli.guard import CONTEXT, ExpandedPath, guarded
from loftq_cli.cli.narrator import Narrator
from loftq_cli.cli.options import (
    all_option,
    directory_argument,
    json_option,
    offline_option,
    revision_option,
)


@click.command(name="error-report", context_settings=CONTEXT)
@directory_argument
@click.option(
    "--source",
    metavar="MODEL",
    help="Recompute everything from the packed bytes and these original weights.",
)
@click.option(
    "--stats",
    metavar="FILE",
    help="Recompute weighted residuals as well, with these activation statistics.",
)
@click.option(
    "--html",
    type=ExpandedPath(),
    metavar="FILE",
    help="Write a page with plots as well, one file that needs no network (extra [report]).",
)
@all_option
@revision_option
@offline_option
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, a row per layer.")
@guarded
def error_report(
    directory: str,
    source: str | None,
    stats: str | None,
    html: Path | None,
    every: bool,
    revision: str | None,
    offline: bool,
    as_json: bool,
    as_csv: bool,
    verbose: bool,
) -> None:
    """Show how far Q + BA is from W: Frobenius residuals per layer.

    DIR is a directory or a hub id.

    \b
    loftq error-report
    loftq error-report out/ --source ./my-model --html report.html
    loftq error-report out/ --source ./my-model --stats stats.safetensors
    """
    from loftq_cli.checkpoint.locate import locate_output
    from loftq_cli.reporting.report import report as run

    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    narrator = Narrator(quiet=False, verbose=verbose)
    place = locate_output(
        directory,
        revision=revision,
        offline=offline,
        everything=source is not None,
        listener=narrator,
    )
    report = run(place, source, stats, offline=offline, html=html)
    reports.residuals(report, as_json=as_json, as_csv=as_csv, every=every)
    if html is not None:
        narrator.note(f"wrote {html}")
