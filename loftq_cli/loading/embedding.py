"""A table of embeddings that stays packed in memory.

If rows begin with a byte and a block, only the rows that are looked up are decoded; if they
do not, the whole table is, and let go again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from loftq_cli.checkpoint.packing import pack, unpack, unpack_at
from loftq_cli.loading.packed_weight import (
    PackedFormat,
    PackedTensors,
    PackedWeight,
    dense,
    is_described,
)
from loftq_cli.numerics.quantizers import trellis_code
from loftq_cli.numerics.quantizers.blocks import scale_blocks
from loftq_cli.numerics.quantizers.scale_storage import STEP_GROUP, unpack_scales


class PackedEmbedding(PackedWeight, nn.Embedding):
    """``y = dequantize(weight)[ids]`` for a packed weight (num_embeddings, embedding_dim), see
    PackedWeight; times ``embed_scale`` if the model's own module scales.

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
        stored = self.tensors
        aligned = columns * packing.bits % 8 == 0 and (
            packing.decoding == "affine"
            or packing.block_size == 0
            or columns % packing.block_size == 0
        )
        if not aligned:
            return dense((rows, columns), packing, self.dtype, stored)[ids]
        together = packing.decoding == "trellis"  # with codes of other rows
        chosen = stored
        if not together:
            chosen = stored._replace(codes=stored.codes.view(rows, -1)[ids].view(-1))
        if packing.block_size:
            per_row = stored.scales.numel() // rows
            numbers = torch.arange(per_row, device=ids.device)
            chosen = _of_blocks(chosen, (ids[:, None] * per_row + numbers).view(-1), packing.bits)
        if together and not is_described(stored.codes):
            units = self._units(ids).view(-1)
            scales = unpack_scales(chosen.scales, chosen.steps)
            values = scale_blocks(units, scales, packing.block_size)
            return values.view(-1, columns).to(self.dtype)
        return dense((ids.numel(), columns), packing, self.dtype, chosen)

    def _units(self, ids: torch.Tensor) -> torch.Tensor:
        """The levels of those rows, float32 (ids, embedding_dim), which codes of other rows choose
        with their own."""
        rows, columns = self.num_embeddings, self.embedding_dim
        places = trellis_code.above(ids, rows)
        packed = self.weight.view(rows, -1)[places].view(-1)
        codes = unpack(packed, trellis_code.BITS, places.numel() * columns)
        numbers = trellis_code.numbers_of(codes.view(*places.shape, columns), ids, rows)
        return trellis_code.levels(ids.device)[numbers]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


def _of_blocks(stored: PackedTensors, blocks: torch.Tensor, bits: int) -> PackedTensors:
    """``stored`` with the scales and zero points of these ``blocks`` only."""
    scales, steps, zeros = stored.scales[blocks], stored.steps, stored.zeros
    if steps is not None:
        scales, steps = scales * steps.float()[blocks // STEP_GROUP], None
    if zeros is not None:
        zeros = pack(unpack_at(zeros, bits, blocks), bits)
    return stored._replace(scales=scales, steps=steps, zeros=zeros)
