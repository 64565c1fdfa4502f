"""A method of quantizing from outside the package: every weight becomes the nearest power of two.

``w = scale * level``, levels 0 and the powers of two below 1, the scale the largest magnitude.
"""

from __future__ import annotations

import torch

from loftq_cli.numerics.quantizers.base import Quantizer
from loftq_cli.numerics.quantizers.codebook import CodebookQuantizer
from loftq_cli.numerics.quantizers.codebooks import make_table
from loftq_cli.numerics.quantizers.methods import Method, Wanted, register

NAME = "toy-powers"


def levels(bits: int) -> torch.Tensor:
    """Float32 (2**bits,), ascending: -1, -1/2, … 0 … 1/2, 1."""
    count = 2 ** (bits - 1)
    positive = [2.0**-exponent for exponent in range(count)]
    negative = [-value for value in positive[: count - 1]]
    return torch.tensor([*negative, 0.0, *reversed(positive)])


def make(wanted: Wanted) -> Quantizer:
    table = make_table(levels(wanted.bits))
    return CodebookQuantizer(table, wanted.bits, wanted.block_size, "absmax")


register(Method(NAME, make, widths=(2, 3), limit="3 bits have powers enough", own_scale=True))
