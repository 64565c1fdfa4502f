"""The fast SVD against the exact one: residual at every T up to 10, absmax and mse scales, the
latter with momentum."""

from __future__ import annotations

from typing import Any

import torch

from loftq_cli.numerics import lowrank
from loftq_cli.numerics.alternation import decompose
from loftq_cli.numerics.decomposition import Procedure
from loftq_cli.numerics.quantizers.methods import make_quantizer
from tests.benchmarks.tools import table
from tests.support.synthetic import llm_like

_ITERS = 10


def main() -> None:
    weight = llm_like(1024, 1024)
    rows = []
    for scale in ("absmax", "mse"):
        for bits, rank in ((2, 16), (2, 64), (4, 64)):
            exact = _residuals(weight, bits, rank, scale, "exact", torch.float32)
            for products in (torch.float32, torch.bfloat16):
                fast = _residuals(weight, bits, rank, scale, "fast", products)
                changes = [ours / theirs - 1 for ours, theirs in zip(fast, exact, strict=True)]
                rows.append(
                    [
                        f"NF{bits}",
                        str(rank),
                        scale,
                        str(products).removeprefix("torch."),
                        f"{changes[0]:+.3%}",
                        f"{max(changes):+.3%}",
                        f"{changes[-1]:+.3%}",
                    ]
                )
    table(("bits", "rank", "scales", "products", "T = 1", "worst T <= 10", "T = 10"), rows)
    print(f"\nproducts on this machine: {lowrank.fastest_products(weight.device)}")


def _residuals(
    weight: torch.Tensor, bits: int, rank: int, scale: Any, svd: Any, products: torch.dtype
) -> list[float]:
    quantizer = make_quantizer("nf", bits, 64, scale)
    settings = Procedure(
        rank=rank,
        iters=_ITERS,
        svd=svd,
        keep="last",
        momentum=scale == "mse",
        products=products,
    )
    return decompose(weight, quantizer, settings).residuals
