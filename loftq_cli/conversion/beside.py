"""A backbone that exists: whether it is one of the source, and its files beside the adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.companions import companions, copy_files
from loftq_cli.checkpoint.deliveries import deliver_all
from loftq_cli.checkpoint.source import Source
from loftq_cli.errors import UnsupportedInputError
from loftq_cli.layouts.rescaled import FILE as RESCALING
from loftq_cli.layouts.rescaled import Rescaling
from loftq_cli.machine.durable import copy_file
from loftq_cli.machine.observer import Observer
from loftq_cli.planning.given import Given
from loftq_cli.planning.pairs import check_same_model
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.rescaled import find_rescaling

_OF_QUANTIZERS = ("quantize_config.json", "quant_config.json", "quantization_config.json")
"""What libraries that quantize write beside config.json."""


def compare(plan: Plan, folder: Path, observer: Observer) -> Rescaling:
    """How the backbone of ``plan`` was rescaled, which is written to ``folder`` unless it was not.

    Raises InputError if it is not one of the source, and what
    :func:`~loftq_cli.planning.rescaled.find_rescaling` does.
    """
    assert plan.given is not None
    deliver_all(plan.source, observer)
    for shard in plan.source.shards:
        for tensor in shard.header.tensors:
            check_same_model(shard, tensor, plan.given)
    rescaling = find_rescaling(plan, observer)
    if rescaling.vectors:
        count = sum(name in rescaling.matrices for name in plan.matrices)
        observer.note(
            f"the backbone was rescaled: {count} of {len(plan.matrices)} matrices are compared "
            "with the source's as they were then"
        )
        rescaling.write(folder / RESCALING)
    return rescaling


def surround(
    given: Given, source: Source, records: Sequence[Mapping[str, Any]], output: Path
) -> None:
    """Put the files of ``given`` into ``output``, if they are to be there; the tokenizer is the
    ``source``'s if it has none of its own.

    Raises UnsupportedInputError if the ``records`` say that it holds the very values of the source,
    SourceChangedError if a file of it was written to meanwhile.
    """
    if not any(record["frobenius"]["quantized"] for record in records):
        raise UnsupportedInputError(
            f"{given.id} holds the very values of {source.id}: there is nothing to correct",
            hint="--source is the model in full precision that the backbone was made from",
        )
    if not given.kept:
        given.check_unchanged()
        return
    theirs = given.raw.directory
    found = {name: source.directory / name for name in companions(source.directory)}
    found |= {name: theirs / name for name in companions(theirs)}
    found |= {name: theirs / name for name in _OF_QUANTIZERS if (theirs / name).is_file()}
    copy_files(found, output)
    for file in given.files:
        copy_file(file.path, output / file.name)
    given.check_unchanged()
