"""What refining costs, by the model's shapes: memory and operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from loftq_cli.families.blocks import block_of
from loftq_cli.layouts.base import Matrix
from loftq_cli.refinement.settings import BATCH, HELD

_OF_BLOCK = 48
"""Bytes of a weight while its codes are trained, too: itself, its gradient and the latent value's,
two moments, two snapshots, what its scale is multiplied with, and what is computed on the way."""
_OF_WHOLE = 24
"""The same if codes stay: itself, its code and what that stands for, the gradients of two halves of
a step, and its share of A and B with their gradients, moments and snapshots."""
_OF_INPUT = 6  # bytes that are kept of a value that goes into a matrix or comes out of it
_OF_LOGIT = 12
_FORWARD, _TRAINED = 2, 6  # operations a weight and token: a product, and its two gradients too


@dataclass(frozen=True)
class Size:
    """A model's size, in values: the ``matrices`` that are refined, those of its ``largest_block``,
    all ``others``, the rows and columns (``sides``) of the matrices, and the ``vocabulary`` of
    ``width`` columns each."""

    matrices: int
    largest_block: int
    others: int
    sides: int
    vocabulary: int
    width: int

    def block_memory(self) -> int:
        """Bytes for one block in training."""
        return self.largest_block * _OF_BLOCK

    def whole_memory(self, length: int) -> int:
        """Bytes for the whole model in training on windows of ``length`` tokens, whose blocks keep
        nothing but their inputs."""
        logits = length * self.vocabulary * _OF_LOGIT
        return self.matrices * _OF_WHOLE + self.others * 4 + logits

    def activations(self, length: int) -> int:
        """Bytes that are kept beyond that if blocks keep everything: one window at a time goes
        through them."""
        return length * self.sides * _OF_INPUT

    def block_operations(self, tokens: int, epochs: int) -> int:
        """Multiplications and additions to refine every block on a text of so many ``tokens``: both
        chains, and training on what is not held out."""
        trained = tokens * epochs * (HELD - 1) // HELD
        return self.matrices * (tokens * 2 * _FORWARD + trained * _TRAINED)

    def whole_operations(self, tokens: int, steps: int, length: int) -> int:
        """The same for so many ``steps`` end to end: the original's predictions, and training with
        blocks that are computed again."""
        taken = self.matrices + self.vocabulary * self.width
        trained = steps * BATCH * length * (_TRAINED + _FORWARD)
        return taken * (tokens * _FORWARD + trained)


def size_of(matrices: Iterable[Matrix], elements: int, config: dict[str, Any]) -> Size:
    """The size of a model of so many ``elements``, of which ``matrices`` are refined."""
    found, blocks, sides = 0, Counter[tuple[str, int] | None](), 0
    for matrix in matrices:
        found += matrix.elements
        blocks[block_of(matrix.name)] += matrix.elements
        sides += sum(matrix.shape)
    inner = config.get("text_config")
    told = {**(inner if isinstance(inner, dict) else {}), **config}
    vocabulary, width = (int(told.get(name) or 0) for name in ("vocab_size", "hidden_size"))
    return Size(found, max(blocks.values()), elements - found, sides, vocabulary, width)
