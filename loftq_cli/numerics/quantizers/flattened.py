"""Blocks over a row-major flattened matrix, for the quantizers that have such."""

from __future__ import annotations

import math

import torch

from loftq_cli.numerics.quantizers.blocks import block_count


class Flattened:
    """What quantizers whose ``block_size`` weights have one scale, 0 being all of them, answer of
    where blocks lie."""

    block_size: int

    def row_step(self, columns: int) -> int:
        return 1 if self.block_size == 0 else self.block_size // math.gcd(columns, self.block_size)

    def blocks_before(self, row: int, columns: int) -> int:
        return block_count(row * columns, self.block_size) if row else 0

    def block_index(self, rows: slice, chosen: torch.Tensor, columns: int) -> torch.Tensor:
        first = torch.arange(rows.start, rows.stop, device=chosen.device) * columns
        place = chosen[:, None] + first
        return place // self.block_size if self.block_size else torch.zeros_like(place)

    def blocks(self, rows: torch.Tensor) -> list[tuple[torch.Tensor, slice]]:
        """Views of the blocks of contiguous ``rows``, (count, size), and their numbers: the whole
        ones, and the short last one if there is one."""
        flat, size = rows.reshape(-1), self.block_size or rows.numel()
        count = flat.numel() // size
        whole = flat[: count * size].view(count, size), slice(0, count)
        rest = flat[count * size :].view(1, -1), slice(count, count + 1)
        return [part for part in (whole, rest) if part[0].numel()]
