"""The command ``loftq evaluate``."""

from __future__ import annotations

from pathlib import Path

import click

from loftq_cli.cli import show
from loftq_cli.cli.guard import CONTEXT, guarded
from loftq_cli.cli.narrator import Narrator
from loftq_cli.cli.options import (
    device_option,
    directory_argument,
    json_option,
    length_option,
    log_option,
    offline_option,
    quiet_option,
    revision_option,
    samples_option,
    seed_option,
    text_option,
)


@click.command(context_settings=CONTEXT)
@directory_argument
@text_option("Text to read, UTF-8 (repeatable); other text than a conversion was measured on.")
@click.option(
    "--source",
    type=str,
    metavar="MODEL",
    help="The original, a directory or hub id, to compare with.",
)
@click.option(
    "--adapter",
    type=str,
    metavar="PATH",
    help="What training saved, instead of the start.  [default: DIR/loftq_init]",
)
@click.option("--save", is_flag=True, help="Keep it in DIR, for `loftq compare` and `loftq push`.")
@samples_option
@length_option
@device_option
@seed_option
@revision_option
@offline_option
@json_option
@quiet_option
@log_option
@guarded
def evaluate(
    directory: str,
    texts: tuple[Path, ...],
    source: str | None,
    adapter: str | None,
    save: bool,
    samples: int | None,
    length: int | None,
    device: str,
    seed: int,
    revision: str | None,
    offline: bool,
    as_json: bool,
    quiet: bool,
    log_file: Path | None,
    verbose: bool,
) -> None:
    """Measure perplexity on text, and how near the model is to the original.

    DIR is a conversion, an export, a merged or any other checkpoint, or the hub id of a conversion.
    With --source: KL divergence and agreement of the likeliest tokens; of models that are no causal
    language models, cosines and errors of hidden states. Needs the extra [train].

    \b
    loftq evaluate out/ --text other.txt
    loftq evaluate out/ --text other.txt --source ./my-model --adapter trained
    """
    from loftq_cli.checkpoint.locate import locate_adapter, locate_output
    from loftq_cli.evaluation.evaluate import Evaluating
    from loftq_cli.evaluation.evaluate import evaluate as run

    narrator = Narrator(quiet=quiet, verbose=verbose, log_file=log_file)
    place = locate_output(
        directory, revision=revision, offline=offline, everything=True, listener=narrator
    )
    trained = (
        None if adapter is None else locate_adapter(adapter, offline=offline, listener=narrator)
    )
    wanted = Evaluating(samples, length, device, seed, trained, offline)
    result = run(place, texts, source, wanted, save=save, observer=narrator)
    show.evaluation(result, as_json=as_json)
