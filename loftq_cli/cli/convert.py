"""The command ``loftq convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loftq_cli.cli import console
from loftq_cli.cli.guard import CONTEXT, ExpandedPath, choice, guarded, json_option
from loftq_cli.cli.narrator import Narrator
from loftq_cli.settings import recipe


@click.command(context_settings=CONTEXT)
@click.argument("model", type=str)
@click.option(
    "-o",
    "--output",
    default="out",
    show_default=True,
    type=ExpandedPath(),
    help="Directory to write.",
)
@click.option(
    "--bits",
    type=float,
    metavar="N",
    help="Width of a code: 2, 3, 4 or 8, or a fraction between 2 and 4, which gives the first "
    "layers 4 bits and the rest 2.  [default: 4]",
)
@click.option(
    "--bits-map",
    type=str,
    metavar="PATTERN=BITS,...",
    help="Widths of these tensors (globs over tensor names, later entries win).",
)
@click.option(
    "--target-bpw",
    type=float,
    metavar="X",
    help="Choose a width for every matrix, instead of --bits: the least residual at an average of "
    "X stored bits per weight, scales included.",
)
@click.option(
    "--method",
    type=choice(*recipe.method_choices()),
    help="Quantizer.  [default: auto, which is nf at 4 bits and uniform at 2, 3 and 8]",
)
@click.option("--rank", type=int, help="Rank of the adapter.  [default: 16]")
@click.option(
    "--rank-map",
    type=str,
    metavar="PATTERN=RANK,...",
    help="Ranks of these tensors (globs over tensor names, later entries win).",
)
@click.option("--iters", type=int, help="Alternating steps; 0 is QLoRA's start.  [default: 5]")
@click.option(
    "--block-size", type=int, help="Weights per scale: 32, 64, 128 or 256.  [default: 64]"
)
@click.option(
    "--layout",
    type=choice(*recipe.layout_choices()),
    help="How the backbone is stored.  [default: auto, which is what stock transformers loads "
    "(bnb, gptq) where that holds every matrix, else loftq]",
)
@click.option(
    "--scale",
    type=choice(*recipe.SCALES),
    help="Fit scales to the least squared error, or take the largest magnitude.  [default: mse]",
)
@click.option(
    "--scale-dtype",
    type=choice(*recipe.SCALE_DTYPES),
    help="How layout loftq stores scales.  [default: float32]",
)
@click.option(
    "--order",
    type=choice(*recipe.ORDERS),
    help="Start from the quantization or from the SVD of the weight.  [default: quantize-first]",
)
@click.option(
    "--svd",
    type=choice(*recipe.SVDS),
    help="Warm-started subspace iteration, or a full SVD every step.  [default: fast]",
)
@click.option(
    "--preset",
    type=choice(*recipe.PRESETS),
    help="Defaults to start from; paper is what the LoftQ reference code does.  [default: default]",
)
@click.option(
    "--recipe",
    "recipe_file",
    type=ExpandedPath(),
    metavar="FILE",
    help="Take options from a TOML or JSON file, or the manifest of an earlier conversion.  "
    "What is given here wins.",
)
@click.option(
    "--save-recipe",
    type=ExpandedPath(),
    metavar="FILE",
    help="Write all options as they were resolved to a TOML file.",
)
@click.option(
    "--embeddings",
    is_flag=True,
    default=None,
    help="Quantize word embeddings as well.",
)
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Quantize these tensors as well (glob over tensor names, repeatable).",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Pass these tensors through (glob over tensor names, repeatable).",
)
@click.option(
    "--stats",
    type=click.Path(),
    metavar="FILE",
    help="Activation statistics (`loftq calibrate`, or a llama.cpp imatrix): minimise the error of "
    "each layer's output instead of its weights.",
)
@click.option(
    "--feedback/--no-feedback",
    default=None,
    help="With full statistics, let the last step make up for the rounding error of each column in "
    "those after it.  [default: yes, where scales are fitted]",
)
@click.option(
    "--calibrate-text",
    "texts",
    multiple=True,
    type=ExpandedPath(),
    metavar="FILE",
    help="Measure such statistics first, on this text (UTF-8, repeatable), and keep them beside "
    "the output.  Needs the extra [train].",
)
@click.option(
    "--moments",
    type=choice("diagonal", "full"),
    help="What --calibrate-text measures.  [default: diagonal]",
)
@click.option(
    "--lora-alpha",
    type=float,
    help="lora_alpha of the adapter; B is divided by the scaling.  [default: the rank]",
)
@click.option(
    "--adapter-dtype",
    type=choice(*recipe.ADAPTER_DTYPES),
    help="dtype of A and B.  [default: source]",
)
@click.option(
    "--dense-dtype",
    type=choice(*recipe.DENSE_DTYPES),
    help="dtype of the backbone in layout dense.  [default: source]",
)
@click.option("--device", type=str, help="auto, cpu, cuda or cuda:N.  [default: auto]")
@click.option("-t", "--threads", type=int, help="CPU threads.  [default: all]")
@click.option("--seed", type=int, help="Seed of every random draw.  [default: 0]")
@click.option("--revision", type=str, help="Branch, tag or commit on the hub.")
@click.option("--offline", is_flag=True, help="Use only what is in the hub cache.")
@click.option(
    "--allow-pickle",
    is_flag=True,
    help="Read pickled weights (pytorch_model.bin) where a directory has no others; nothing in "
    "them is run.",
)
@click.option(
    "--discard-shards",
    is_flag=True,
    help="Delete each shard from the hub once it is converted: room for two of them is enough.  "
    "What is in the hub cache already stays.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output once done.")
@click.option("--dry-run", is_flag=True, help="Show the plan; read headers, write nothing.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress, no remarks.")
@guarded
def convert(
    model: str,
    output: Path,
    revision: str | None,
    offline: bool,
    discard_shards: bool,
    allow_pickle: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    recipe_file: Path | None,
    save_recipe: Path | None,
    texts: tuple[Path, ...],
    moments: str | None,
    **settings: Any,
) -> None:
    """Convert MODEL, a checkpoint directory or a hub id.

    A path that starts with ., / or ~ (or exists) is a directory, anything else a hub id. Running
    the same command again resumes an unfinished conversion.

    \b
    loftq convert meta-llama/Llama-2-7b --bits 2 --rank 64 --iters 5
    loftq convert ./my-model -o quantized --bits 4 --dry-run
    """
    from loftq_cli.calibration import first as calibrate_first
    from loftq_cli.conversion.run import prepare, run, say_remarks
    from loftq_cli.layouts.needs import needs
    from loftq_cli.planning.describe import describe
    from loftq_cli.settings import file as recipes

    narrator = Narrator(quiet=quiet, verbose=verbose)
    options = recipes.options(settings, recipe_file, measuring=bool(texts))
    if save_recipe is not None:
        recipes.check_writable(save_recipe, dry_run=dry_run)
    plan, path = prepare(
        model,
        output,
        options,
        revision=revision,
        offline=offline,
        overwrite=overwrite,
        discard_shards=discard_shards,
        allow_pickle=allow_pickle,
        texts=calibrate_first.asked(texts, moments, dry_run=dry_run),
        observer=narrator,
    )
    if dry_run:
        say_remarks(plan, narrator)
        console.show_plan(describe(plan, path), as_json=as_json)
        return
    outcome = run(plan, path, overwrite=overwrite, observer=narrator)
    if save_recipe is not None:
        recipes.save(save_recipe, outcome.manifest["recipe"])
    if outcome.nothing_to_do:
        narrator.note(f"nothing to do: {output} is complete and verified")
    console.show_outcome(
        outcome.manifest,
        str(output),
        needs(outcome.manifest["recipe"]["layout"]),
        nothing_to_do=outcome.nothing_to_do,
        as_json=as_json,
    )
