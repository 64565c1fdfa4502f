"""Which packed module stands in for a module of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loftq_cli.loading.embedding import PackedEmbedding
from loftq_cli.loading.linear import PackedLinear
from loftq_cli.loading.packed_weight import PackedFormat, PackedWeight

_FORMAT = ("bits", "block_size", "decoding", "scales")


def packed(module: Any, entry: Mapping[str, Any]) -> PackedWeight:
    """The packed module for ``module``, of the kind that the config's ``entry`` names; a transposed
    linear layer becomes an ordinary one."""
    packing = PackedFormat(**{key: entry[key] for key in _FORMAT if key in entry})
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
