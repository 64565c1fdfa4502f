"""The click commands: parse, call, map errors to exit codes. No logic."""

from __future__ import annotations

from pathlib import Path

import click

from loftq_cli.cli import console
from loftq_cli.cli.calibrate import calibrate
from loftq_cli.cli.convert import convert
from loftq_cli.cli.guard import (
    CONTEXT,
    Commands,
    ExpandedPath,
    guarded,
    json_option,
    offline_option,
    revision_option,
)
from loftq_cli.cli.narrator import Narrator
from loftq_cli.cli.options import choice
from loftq_cli.cli.push import push
from loftq_cli.version import VERSION

_directory = click.argument("directory", default="out", type=str, metavar="[DIR]")


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(VERSION, prog_name="loftq")
def main() -> None:
    """Turn a checkpoint into a quantized backbone plus a LoRA adapter that already makes up for
    the quantization (LoftQ).

    \b
    loftq convert meta-llama/Llama-2-7b --bits 2 --rank 64 --iters 5
    loftq inspect out/
    loftq error-report
    """


@main.command(context_settings=CONTEXT)
@_directory
@click.option("-o", "--output", required=True, type=ExpandedPath(), help="Directory to write.")
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
@click.option("-q", "--quiet", is_flag=True, help="No progress, no remarks.")
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
    console.show_merge(result, as_json=as_json)


@main.command(context_settings=CONTEXT)
@_directory
@click.option("--verify", is_flag=True, help="Re-hash every file.")
@revision_option
@offline_option
@json_option
@guarded
def inspect(
    directory: str,
    verify: bool,
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
    console.show_inspection(run(place, verify=verify), as_json=as_json)


@main.command(name="error-report", context_settings=CONTEXT)
@_directory
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
@revision_option
@offline_option
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, a row per layer.")
@guarded
def error_report(
    directory: str,
    source: str | None,
    stats: str | None,
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
    loftq error-report out/ --source ./my-model
    loftq error-report out/ --source ./my-model --stats stats.safetensors
    """
    from loftq_cli.checkpoint.locate import locate_output
    from loftq_cli.reporting.residuals import error_report as run

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
    report = run(place, source, stats, offline=offline)
    console.show_residuals(report, as_json=as_json, as_csv=as_csv)


main.add_command(convert)
main.add_command(calibrate)
main.add_command(push)
