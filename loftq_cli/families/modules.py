"""Which modules of a model a packed module can stand in for."""

from __future__ import annotations

from torch import nn

from loftq_cli.families.kinds import Kind

# Other subclasses of nn.Linear and nn.Embedding may compute something else.
_LINEARS = ("Linear", "FalconLinear")
_SCALED_EMBEDDING = "ScaledWordEmbedding"


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of matrix (see kinds) that ``module`` has as its weight, None if no packed
    module computes what it does."""
    name = type(module).__name__
    if isinstance(module, nn.Linear):
        return "linear" if name in _LINEARS else None
    if isinstance(module, nn.Embedding):
        plain = type(module) is nn.Embedding or name.endswith(_SCALED_EMBEDDING)
        return "embedding" if plain and module.max_norm is None else None
    return "conv1d" if name == "Conv1D" else None
