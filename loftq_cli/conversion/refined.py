"""``convert --refine``: what is converted is refined at once, and its start kept beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loftq_cli.calibration.first import Texts
from loftq_cli.checkpoint.output import open_output
from loftq_cli.machine.observer import Observer
from loftq_cli.planning.plan import Plan
from loftq_cli.refinement.conversion import refuse_expert
from loftq_cli.refinement.cost import size_of
from loftq_cli.refinement.refine import refine
from loftq_cli.refinement.room import LENGTH, planned
from loftq_cli.refinement.settings import SAMPLES, Refining


def start_of(output: Path, texts: Texts | None) -> Path:
    """Where the conversion lies that is to end in ``output``: beside it, if it is refined."""
    refined = texts is not None and texts.refine
    return output.with_name(f"{output.name}.start") if refined else output


def cost_note(plan: Plan) -> str:
    """What refining what ``plan`` makes will cost, in one line. Raises UnsupportedInputError for
    what cannot be refined."""
    for name in plan.matrices:
        refuse_expert(plan.source.directory, name)
    matrices = [item.matrix for item in plan.matrices.values()]
    size = size_of(matrices, plan.parameters, plan.source.config.content)
    wanted = planned(Refining(), size, plan.device)
    length, tokens = LENGTH, SAMPLES * LENGTH
    memory, operations = size.block_memory(), 0
    if wanted.epochs:
        operations += size.block_operations(tokens, wanted.epochs)
    if wanted.end_to_end:
        memory = size.whole_memory(length)
        operations += size.whole_operations(tokens, wanted.end_to_end, length)
    return (
        f"refining follows: at most {operations / 1e12:,.0f} tera-operations, and "
        f"{memory / 1e9:.1f} GB of memory beside the model"
    )


def refine_start(
    plan: Plan,
    start: Path,
    output: Path,
    texts: Texts,
    model: str,
    *,
    offline: bool,
    overwrite: bool,
    observer: Observer,
) -> dict[str, Any]:
    """Refine what ``plan`` has made in ``start`` against ``model``, to ``output``; the manifest.
    Raises what :func:`~loftq_cli.refinement.refine.refine` does."""
    files = texts.files(plan.source, start)
    wanted = Refining(device=plan.recipe.device, offline=offline)
    refine(start, output, model, files, wanted, overwrite=overwrite, observer=observer)
    return open_output(output).manifest
