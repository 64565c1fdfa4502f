"""A table of embeddings that stays packed in memory.

Where rows begin with a byte and a block, only the rows that are looked up are decoded; where they
do not, the whole table is, and let go again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from loftq_cli.loading.packed_weight import PackedFormat, PackedWeight, dense
from loftq_cli.numerics.quantizers.packing import pack, unpack_at
from loftq_cli.numerics.quantizers.scale_storage import STEP_GROUP


class PackedEmbedding(PackedWeight, nn.Embedding):
    """``y = dequantize(weight)[ids]`` for a packed weight (num_embeddings, embedding_dim), see
    PackedWeight; times ``embed_scale`` where the model's own module scales.

    Input integers of any shape (...,), output (..., embedding_dim) in ``dtype``, which follows the
    dtype that the module is moved to. No gradients. ``rounds_scale``: the factor is rounded to
    ``dtype`` first, as Gemma does.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        packing: PackedFormat,
        dtype: torch.dtype,
        padding_idx: int | None = None,
        embed_scale: float | None = None,
        rounds_scale: bool = False,
    ) -> None:
        """On the meta device, to be filled by assignment."""
        nn.Embedding.__init__(
            self, num_embeddings, embedding_dim, padding_idx=padding_idx, device="meta"
        )
        self.hold((num_embeddings, embedding_dim), packing)
        self.dtype = dtype
        self.scale = embed_scale
        self.rounds_scale = rounds_scale
        if embed_scale is not None:
            # PEFT scales the adapter by it. A number it would take in the dtype of weight, uint8.
            self.embed_scale = torch.tensor(embed_scale, device="cpu")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        ids, places = torch.unique(input, return_inverse=True)
        if ids.numel() and not 0 <= int(ids[0]) <= int(ids[-1]) < self.num_embeddings:
            raise IndexError(f"index out of range: a table of {self.num_embeddings} rows")
        values = self._rows(ids)[places]
        if self.scale is None:
            return values
        rounded = torch.tensor(self.scale, dtype=self.dtype) if self.rounds_scale else self.scale
        return values * rounded

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Those rows of the table (ids, embedding_dim), in ``dtype``."""
        packing, rows, columns = self.packing, self.num_embeddings, self.embedding_dim
        scales, steps, zeros = self.weight_scales, self.weight_scale_steps, self.weight_zeros
        weight: torch.Tensor = self.weight
        per_row = scales.numel() // rows  # 0: one block for everything
        aligned = columns * packing.bits % 8 == 0 and (
            packing.decoding == "affine"
            or packing.block_size == 0
            or columns % packing.block_size == 0
        )
        if not aligned:
            shape = (rows, columns)
            table = dense(
                shape, packing, self.dtype, weight, scales, steps, zeros, self.weight_levels
            )
            return table[ids]
        if packing.block_size:
            numbers = torch.arange(per_row, device=ids.device)
            blocks = (ids[:, None] * per_row + numbers).view(-1)
            scales = scales[blocks]
            if steps is not None:
                scales, steps = scales * steps.float()[blocks // STEP_GROUP], None
            if zeros is not None:
                zeros = pack(unpack_at(zeros, packing.bits, blocks), packing.bits)
        weight = weight.view(rows, -1)[ids].view(-1)
        shape = (ids.numel(), columns)
        return dense(shape, packing, self.dtype, weight, scales, steps, zeros, self.weight_levels)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)
