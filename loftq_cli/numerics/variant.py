"""Which variant of the inner loops ran: it changes the last bits, so the recipe names it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

REVISION = 12
"""Raised whenever the same settings begin to give other bytes, so that a conversion begun by one
version of this package is not finished by another."""

_PRODUCTS = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float32)}


@dataclass(frozen=True)
class Variant:
    """``native``: the sweeps run in the compiled kernels, else in tensor operations;
    ``products``: the dtype that the fast SVD multiplies in."""

    native: bool
    products: torch.dtype

    def __str__(self) -> str:
        """REVISION:SEARCH+PRODUCTS, as the recipe holds it."""
        search = "native" if self.native else "tensor"
        return f"{REVISION}:{search}+{str(self.products).removeprefix('torch.')}"

    @staticmethod
    def parse(text: str) -> Variant:
        """Inverse of str(), whatever the revision. Raises ValueError."""
        _, _, names = text.partition(":")
        search, _, products = names.partition("+")
        if search not in ("native", "tensor") or products not in _PRODUCTS:
            raise ValueError(f"unknown kernels {text!r}")
        return Variant(search == "native", _PRODUCTS[products])
