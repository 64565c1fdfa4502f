"""The tensors of a backbone that have an entry per token: they may be resized by training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from loftq_cli.families.architecture import HEAD_BIAS, has_output_embedding, shared_with
from loftq_cli.families.token_tables import TokenTables
from loftq_cli.merging.backbone import Backbone, InFile
from loftq_cli.merging.same import same_bytes


@dataclass(frozen=True)
class Vocabulary:
    """``inputs`` and ``outputs``: names of the input and output embeddings (tokens, dim) in the
    backbone; ``biases`` of the outputs, (tokens,); ``shape`` is that of the first input. ``tied``:
    the model uses its input embedding for its output, under a name that the files may lack.
    ``tables``: what the class calls them; if that is not known, names decide."""

    inputs: Sequence[str]
    outputs: Sequence[str]
    biases: Sequence[str]
    shape: tuple[int, ...]
    tied: bool
    tables: TokenTables = field(default_factory=TokenTables)

    def has(self, name: str) -> bool:
        """Whether ``name`` is an embedding, perhaps one that is stored under another name only."""
        return name in self.inputs or name in self.outputs or self.is_absent_head(name)

    def is_absent_head(self, name: str) -> bool:
        """Whether ``name`` is the output embedding that the files have as the input's only."""
        return self.tied and not self.outputs and self.is_output(name)

    def is_output(self, name: str) -> bool:
        """Whether ``name`` is an output embedding, in the backbone or not."""
        return name in self.tables.outputs or has_output_embedding([name])

    def is_bias(self, name: str) -> bool:
        """Whether ``name`` is a bias of an output embedding, in the backbone or not."""
        return bool(self.shape and (name in self.tables.biases or HEAD_BIAS.search(name)))

    def may_have(self, name: str, shape: tuple[int, ...], own: tuple[int, ...] | None) -> bool:
        """Whether the tensor ``name`` may come in ``shape`` if the backbone has ``own``, or
        nothing."""
        if self.has(name):
            return len(shape) == 2 and shape[1:] == (own or self.shape)[1:]
        return name in self.biases and len(shape) == 1


def vocabulary_of(backbone: Backbone, tables: TokenTables | None) -> Vocabulary:
    """What of ``backbone`` has an entry per token; ``tables`` of its class, named as on disk, None
    if they are not known."""
    shapes: Mapping[str, tuple[int, ...]] = backbone.shapes
    known = tables or TokenTables()
    inputs = [name for name in known.inputs if name in shapes]
    inputs += [n for n, kind in backbone.kinds.items() if kind == "embedding" and n not in inputs]
    if not inputs:
        return Vocabulary((), (), (), (), False)
    shape = shapes[inputs[0]]
    found = Vocabulary(inputs, (), (), shape, False, known)
    outputs = [n for n, s in shapes.items() if found.is_output(n) and s[:1] == shape[:1]]
    outputs.sort(key=lambda name: name not in known.outputs)
    biases = [n for n, s in shapes.items() if found.is_bias(n) and s == shape[:1]]
    named = shared_with("", backbone.config, shapes) is not None
    tied = tables.tied if tables and tables.outputs else named
    if tied and outputs:  # stored twice; transformers ties what is the same
        first, second = (backbone.stored.get(name) for name in (inputs[0], outputs[0]))
        tied = bool(first and second and same_bytes(InFile(*first), InFile(*second)))
    return replace(found, outputs=outputs, biases=biases, tied=tied)
