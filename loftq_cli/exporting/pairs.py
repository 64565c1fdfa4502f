"""The pairs of an adapter for readers that know nothing but pairs: llama.cpp and MLX."""

from __future__ import annotations

from loftq_cli.errors import InputError
from loftq_cli.layouts.trained_parts import Pair
from loftq_cli.merging.plan import MergePlan


def pairs_of(merging: MergePlan, reader: str) -> dict[str, Pair]:
    """The pairs of the adapter of ``merging``, by the name of the tensor in the backbone's files.
    Raises InputError for an adapter that holds more, for which ``reader`` has no place."""
    more = [*(spec.name for spec in merging.added), *merging.replaced]
    more += [item.spec.name for item in merging.merged if item.weight.tokens is not None]
    if more:
        raise InputError(
            f"{merging.adapter.file}: it holds {more[0]} in full, and {reader} reads pairs alone",
            hint="merge it (`loftq merge`), and convert that",
        )
    return {
        item.spec.name: item.weight.pair for item in merging.merged if item.weight.pair is not None
    }


def rank_of(pair: Pair) -> int:
    """Of A and B."""
    total = pair.lora_A.shape[0]
    return total if pair.slice is None else total // pair.slice.count
