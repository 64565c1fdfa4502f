"""Which packed module stands in for a module of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from loftq_cli.integrations.embedding import PackedEmbedding
from loftq_cli.integrations.modules import PackedLinear
from loftq_cli.integrations.packed_weight import PackedFormat, PackedWeight

# Other subclasses of nn.Linear and nn.Embedding may compute something else.
_LINEARS = ("Linear", "FalconLinear")
_SCALED_EMBEDDING = "ScaledWordEmbedding"


def kind_of(module: nn.Module) -> str | None:
    """The kind of matrix (see layouts.base) that ``module`` has as its weight, None where no packed
    module computes what it does."""
    name = type(module).__name__
    if isinstance(module, nn.Linear):
        return "linear" if name in _LINEARS else None
    if isinstance(module, nn.Embedding):
        plain = type(module) is nn.Embedding or name.endswith(_SCALED_EMBEDDING)
        return "embedding" if plain and module.max_norm is None else None
    return "conv1d" if name == "Conv1D" else None


def packed(module: Any, entry: Mapping[str, Any]) -> PackedWeight:
    """The packed module for ``module``, of the kind that the config's ``entry`` names; a transposed
    linear layer becomes an ordinary one."""
    packing = PackedFormat(**{key: value for key, value in entry.items() if key != "kind"})
    dtype = module.weight.dtype
    kind = entry.get("kind", "linear")
    if kind == "embedding":
        rounded: float | None = getattr(module, "scalar_embed_scale", None)
        return PackedEmbedding(
            module.num_embeddings,
            module.embedding_dim,
            packing,
            dtype,
            padding_idx=module.padding_idx,
            embed_scale=getattr(module, "embed_scale", None) if rounded is None else rounded,
            rounds_scale=rounded is not None,
        )
    columns, rows = module.weight.shape if kind == "conv1d" else module.weight.shape[::-1]
    return PackedLinear(columns, rows, packing, bias=module.bias is not None, dtype=dtype)
