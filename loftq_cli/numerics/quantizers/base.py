"""What a quantizer is: a float32 matrix to N-bit codes with one scale (and zero point) per block.

What is stored and what it decodes to:

- ``CodebookQuantizer`` (nf, nf-symmetric, uniform-block): ``w = scale * levels[code]``, blocks of
  ``block_size`` over the row-major flattened matrix, the last one short (bitsandbytes' order).
- ``FittedQuantizer``: the same with levels of the matrix's own.
- ``UniformQuantizer``: ``w = scale * (code - zero)``, groups of ``block_size`` along in_features,
  the last one of each row short (GPTQ's order). A scale is rounded, if it is to be portable,
  before the codes are chosen. The zero point is an integer in [1, 2**bits - 1]: GPTQ's format
  stores ``zero - 1``, and consumers disagree about what a stored -1 means. Symmetric, it is
  2**(bits - 1), and the scale has either sign.
- ``TensorUniformQuantizer``: one table of evenly spaced levels for the whole matrix.
- ``TrellisQuantizer``: as a codebook's, of levels that several codes of a column choose together.

Scales are ``absmax`` (the reference: largest magnitude, for uniform the min-max range) or ``mse``:
a coarse grid around absmax followed by least-squares steps, which keeps the storage and lowers the
squared error. A fit can start from the scales of the previous alternation step instead of the grid.

Everything works on row ranges whose elements are whole blocks (:func:`row_step`), so that a caller
streams a matrix through in pieces that stay in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch

from loftq_cli.numerics.quantizers.blocks import Fit, Fitted, Parameters, Quantized
from loftq_cli.numerics.quantizers.grid import Search

Scale = Literal["mse", "absmax", "fixed"]


class Quantizer(Protocol):
    """What the alternation needs of a quantizer."""

    def row_step(self, columns: int) -> int:
        """Row ranges handed to :meth:`fit` start at multiples of this."""

    def blocks_before(self, row: int, columns: int) -> int:
        """Blocks that lie before ``row`` (a multiple of :meth:`row_step`, or the last row)."""

    def prepare(
        self, pieces: Sequence[slice], target: Callable[[slice], torch.Tensor], fit: Fit
    ) -> Quantizer:
        """The quantizer for one matrix in one alternation step, from that of the step before:
        ``target`` gives float32 row ranges of what is to be quantized, ``pieces`` cover it, and
        ``fit`` quantizes, as :meth:`fit` does or faster."""

    def search(self) -> Search | None:
        """What the compiled kernels need to do the same, or None if they are not to."""

    def fit(self, rows: torch.Tensor, start: Parameters | None) -> Fitted:
        """Quantize float32 (rows, in), beginning the search at ``start`` if scales are
        searched for. Raises ScaleRangeError if a scale does not fit its storage dtype."""

    def encode(self, rows: torch.Tensor, parameters: Parameters) -> Fitted:
        """Quantize float32 contiguous (rows, in) at the given scales and zero points."""

    def encode_at(
        self, x: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes uint8, values float32) of float32 ``x`` (count,), the weights of a column from a
        multiple of :meth:`row_step` on; ``scales`` and, if there are any, ``zeros`` float32
        (count,)."""

    def block_index(self, rows: slice, chosen: torch.Tensor, columns: int) -> torch.Tensor:
        """int64 (count, rows): the numbers of the blocks that these ``rows`` of the ``chosen``
        columns, int64 (count,), are in, of a matrix that has so many ``columns``."""

    def assemble(self, codes: torch.Tensor, parameters: Parameters) -> Quantized:
        """The whole matrix from its concatenated parts."""
