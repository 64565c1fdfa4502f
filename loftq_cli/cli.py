"""The click commands: parse, call, map errors to exit codes. No logic."""

from __future__ import annotations

from pathlib import Path

import click

from loftq_cli import console
from loftq_cli.cli_calibrate import calibrate
from loftq_cli.cli_convert import convert
from loftq_cli.cli_push import push
from loftq_cli.command import CONTEXT as _CONTEXT
from loftq_cli.command import choice as _choice
from loftq_cli.command import guarded as _guarded
from loftq_cli.command import json_option as _json_option
from loftq_cli.narrator import Narrator
from loftq_cli.version import VERSION

_directory = click.argument(
    "directory", default="out", type=click.Path(path_type=Path), metavar="[DIR]"
)


@click.group(context_settings=_CONTEXT)
@click.version_option(VERSION, prog_name="loftq")
def main() -> None:
    """Turn a checkpoint into a quantized backbone plus a LoRA adapter that already makes up for
    the quantization (LoftQ).

    \b
    loftq convert meta-llama/Llama-2-7b --bits 2 --rank 64 --iters 5
    loftq inspect out/
    loftq error-report
    """


@main.command(context_settings=_CONTEXT)
@_directory
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory to write."
)
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Directory, or adapter_model.safetensors in it, that training saved.  "
    "[default: DIR/loftq_init]",
)
@click.option(
    "--dtype",
    type=_choice("float32", "float16", "bfloat16"),
    help="dtype of the merged matrices.  [default: what they had before the conversion]",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier merge once done.")
@_json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress, no remarks.")
@_guarded
def merge(
    directory: Path,
    output: Path,
    adapter: Path | None,
    dtype: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Merge a conversion and its adapter, trained or not, into an ordinary checkpoint.

    The result loads in stock transformers, without loftq and without peft.

    \b
    loftq merge out/ -o merged
    loftq merge out/ -o merged --adapter trained --dtype bfloat16
    """
    from loftq_cli.conversion.merge import merge as run

    narrator = Narrator(quiet=quiet, verbose=verbose)
    result = run(
        directory, output, adapter=adapter, dtype=dtype, overwrite=overwrite, observer=narrator
    )
    console.show_merge(result, as_json=as_json)


@main.command(context_settings=_CONTEXT)
@_directory
@click.option("--verify", is_flag=True, help="Re-hash every file.")
@_json_option
@_guarded
def inspect(directory: Path, verify: bool, as_json: bool, verbose: bool) -> None:
    """Show what a conversion holds: totals, bits per weight, layers, how to load it.

    \b
    loftq inspect out/
    loftq inspect out/ --verify
    """
    from loftq_cli.reporting.inspect import inspect as run

    console.show_inspection(run(directory, verify=verify), as_json=as_json)


@main.command(name="error-report", context_settings=_CONTEXT)
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
@_json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, a row per layer.")
@_guarded
def error_report(
    directory: Path,
    source: str | None,
    stats: str | None,
    as_json: bool,
    as_csv: bool,
    verbose: bool,
) -> None:
    """Show how far Q + BA is from W: Frobenius residuals per layer.

    \b
    loftq error-report
    loftq error-report out/ --source ./my-model
    loftq error-report out/ --source ./my-model --stats stats.safetensors
    """
    from loftq_cli.reporting.residuals import error_report as run

    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    console.show_residuals(run(directory, source, stats), as_json=as_json, as_csv=as_csv)


main.add_command(convert)
main.add_command(calibrate)
main.add_command(push)
