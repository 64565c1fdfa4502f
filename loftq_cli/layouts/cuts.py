"""The tensors of a source whose matrices were converted each for itself, from a manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from loftq_cli.checkpoint.stacks import Stack
from loftq_cli.families.experts import part_of
from loftq_cli.layouts.base import matrix_of


def stacks_of(records: Iterable[Mapping[str, Any]]) -> dict[str, Stack]:
    """By the tensor's name; ``records`` are the manifest's ``matrices``."""
    counts: Counter[str] = Counter()
    found = {}
    for matrix in map(matrix_of, records):
        if matrix.cut is not None and (part := part_of(matrix.module)):
            counts[matrix.cut.tensor] += 1
            leaf, count = part[1].partition(".")[2], counts[matrix.cut.tensor]
            stack = Stack(matrix.cut.tensor, part[0], leaf, count, matrix.cut.transposed)
            found[matrix.cut.tensor] = stack
    return found
