"""The command ``loftq export``."""

from __future__ import annotations

from pathlib import Path

import click

from loftq_cli.cli import show
from loftq_cli.cli.guard import CONTEXT, ExpandedPath, guarded
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
from loftq_cli.layouts import registry


@click.command(context_settings=CONTEXT)
@directory_argument
@output_option
@click.option(
    "--layout",
    required=True,
    type=choice(*registry.names(), "gguf", "mlx"),
    help="How the codes are stored.",
)
@click.option(
    "--adapter",
    type=str,
    metavar="PATH",
    help="Directory, or adapter_model.safetensors in it, that training saved; or a hub id. It goes "
    "to OUTPUT/adapter.",
)
@click.option(
    "--merge",
    is_flag=True,
    help="Merge --adapter into the codes, which are chosen anew; no adapter is left.",
)
@click.option(
    "--stats",
    type=ExpandedPath(),
    metavar="FILE",
    help="Activation statistics (`loftq calibrate`), by which --merge feeds errors back.",
)
@click.option(
    "--skeleton",
    type=ExpandedPath(),
    metavar="FILE",
    help="For gguf: the model's GGUF file in F32, F16 or BF16, which the codes go into.",
)
@click.option(
    "--source",
    type=str,
    metavar="MODEL",
    help="For gguf: the model that was converted, if the skeleton is of that; or a hub id.",
)
@click.option("--strict", is_flag=True, help="For gguf: refuse tensors that need 16 bits.")
@click.option(
    "--rounded",
    is_flag=True,
    help="For mlx: round scales and offsets that the dtype has too few bits for; by how much the "
    "values are then off is said.",
)
@click.option("--pad-ranks", is_flag=True, help="Give every pair one rank, by zeros.")
@click.option(
    "--base-model",
    type=str,
    metavar="ID",
    help="What the adapters' configs call the backbone.  [default: OUTPUT]",
)
@revision_option
@offline_option
@click.option("--overwrite", is_flag=True, help="Replace an earlier conversion once done.")
@json_option
@quiet_option
@guarded
def export(
    directory: str,
    output: Path,
    layout: str,
    adapter: str | None,
    merge: bool,
    stats: Path | None,
    skeleton: Path | None,
    source: str | None,
    strict: bool,
    rounded: bool,
    pad_ranks: bool,
    base_model: str | None,
    revision: str | None,
    offline: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Write the codes of a conversion in another layout, nothing computed anew.

    DIR is a directory or a hub id. What the layout cannot hold exactly is refused. The result is a
    conversion, as `loftq convert` would have written it. With --merge the codes are those of the
    trained model, and the result has no adapter. With --layout gguf it is model.gguf and
    adapter.gguf, for llama.cpp and Ollama; with --layout mlx a model and adapters of mlx-lm.

    \b
    loftq export out/ -o served --layout compressed
    loftq export out/ -o served --layout compressed --adapter trained --pad-ranks
    loftq export out/ -o served --layout awq --adapter trained --merge --stats stats.safetensors
    loftq export out/ -o served --layout gguf --adapter trained --skeleton f16.gguf --source MODEL
    loftq export out/ -o served --layout mlx
    """
    from loftq_cli.checkpoint.locate import locate_adapter, locate_output
    from loftq_cli.exporting.request import Request, carry_out
    from loftq_cli.exporting.work import Wanted

    narrator = Narrator(quiet=quiet, verbose=verbose)
    place = locate_output(
        directory, revision=revision, offline=offline, everything=True, listener=narrator
    )
    trained = (
        None if adapter is None else locate_adapter(adapter, offline=offline, listener=narrator)
    )
    wanted = Wanted(layout, trained, merge, stats, pad_ranks, base_model)
    asked = Request(wanted, skeleton, source, strict, rounded, offline)
    result = carry_out(place.directory, output, asked, overwrite=overwrite, observer=narrator)
    shown = {"gguf": show.exported_gguf, "mlx": show.exported_mlx}.get(layout, show.exported)
    shown(result, as_json=as_json)
