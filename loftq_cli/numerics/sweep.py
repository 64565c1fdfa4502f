"""One alternation step's passes over the matrix: subtract the product, quantize, keep R = W - Q.

A matrix is swept in row ranges that fit the cache. Beside W, in its own dtype, R is held in
float32, for residuals, and in the dtype that the low-rank step multiplies in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from loftq_cli.numerics.metrics import squares
from loftq_cli.numerics.quantizers.base import Quantizer
from loftq_cli.numerics.quantizers.blocks import Fitted, Parameters, Quantized
from loftq_cli.numerics.quantizers.scale_storage import Stored, round_scales

_CHUNK_ELEMENTS = 1 << 19  # a few float32 copies of it stay in a CPU's caches
_GPU_CHUNK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Product:
    """P = ``left`` (out, r) @ ``right`` (r, in), float32: what the adapter adds, from its stored
    values.

    What is subtracted before quantizing goes ``beyond``: P + beyond * (P - ``before``), where
    ``before`` None is zero. Residuals are P's.
    """

    left: torch.Tensor
    right: torch.Tensor
    beyond: float = 0.0
    before: Product | None = None


@dataclass(frozen=True)
class Swept:
    """A quantized matrix, ``squared`` = ||W - Q||^2, and ``previous`` = ||R - product||^2, of the
    R that was there before: the residual of the previous step."""

    quantized: Quantized
    squared: float
    previous: float


class Sweep(Protocol):
    """``residual`` R float32 (out, in) and ``narrow``, the same in the products' dtype (the same
    tensor if that is float32), as the last :meth:`quantize` left them; ``remains``, unless it
    is None, receives R - product, in the dtype of ``narrow``, from either pass that is given one.
    ``quantizer``: as the last :meth:`quantize` prepared it."""

    quantizer: Quantizer
    residual: torch.Tensor
    narrow: torch.Tensor
    remains: torch.Tensor | None

    def quantize(self, start: Parameters | None, product: Product | None) -> Swept:
        """Quantize W - product, or beyond, beginning beside the scales of ``start``. Raises
        ScaleRangeError."""

    def remainder(self, product: Product) -> float:
        """||R - product||^2."""


class TensorSweep:
    """A sweep in tensor operations, on any device. Values are rounded to ``backbone_dtype`` before
    they are subtracted, if the backbone is stored dense; scales as ``scale_dtype`` stores them
    before the codes are chosen."""

    def __init__(
        self,
        weight: torch.Tensor,
        quantizer: Quantizer,
        products: torch.dtype,
        backbone_dtype: torch.dtype | None,
        scale_dtype: Stored = "float32",
    ) -> None:
        self._weight = weight
        self.quantizer = quantizer
        self._backbone_dtype = backbone_dtype
        self._scale_dtype: Stored = scale_dtype
        self.residual = torch.empty_like(weight, dtype=torch.float32)
        same = products == torch.float32
        self.narrow = self.residual if same else torch.empty_like(weight, dtype=products)
        self.remains: torch.Tensor | None = None

    def quantize(self, start: Parameters | None, product: Product | None) -> Swept:
        self.quantizer = quantizer = self.quantizer.prepare(
            [rows for rows, _ in self._pieces()],
            lambda rows: target_of(self._weight, product, rows),
            lambda quantizer, rows, start: quantizer.fit(rows, start),
        )
        swept = self._pass(
            product,
            lambda rows, blocks: quantizer.fit(rows, None if start is None else start[blocks]),
        )
        if self._scale_dtype == "float32":
            return swept
        given, previous = stored_parameters(swept.quantized, self._scale_dtype), swept.previous
        del swept  # its codes
        again = self._pass(
            product, lambda rows, blocks: quantizer.encode(rows, given[blocks]), again=True
        )
        return replace(again, previous=previous)

    def _pass(
        self,
        product: Product | None,
        quantize: Callable[[torch.Tensor, slice], Fitted],
        *,
        again: bool = False,
    ) -> Swept:
        """Every row range through ``quantize``, which takes the target and the numbers of its
        blocks. ``again``: R is no longer the previous step's."""
        quantizer = self.quantizer
        codes = torch.empty(self._weight.shape, dtype=torch.uint8, device=self._weight.device)
        parts: list[Parameters] = []
        sums = torch.zeros(2, dtype=torch.float64, device=self._weight.device)
        for rows, blocks in self._pieces():
            weight, residual = self._weight[rows].float(), self.residual[rows]
            target = weight
            if product is not None:
                delta = product.left[rows] @ product.right
                sums[1] += squares(residual.sub_(delta))
                if self.remains is not None and not again:
                    self.remains[rows] = residual
                target = weight - _reach(product, delta, rows)
            fitted = quantize(target, blocks)
            codes[rows] = fitted.codes
            parts.append(fitted.parameters)
            torch.sub(weight, as_stored(fitted.values, self._backbone_dtype), out=residual)
            sums[0] += squares(residual)
            if self.narrow is not self.residual:
                self.narrow[rows] = residual
        squared, previous = sums.tolist()
        return Swept(quantizer.assemble(codes, Parameters.join(parts)), squared, previous)

    def remainder(self, product: Product) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self._weight.device)
        for rows, _ in self._pieces():
            delta = product.left[rows] @ product.right
            total += squares(torch.sub(self.residual[rows], delta, out=delta))
            if self.remains is not None:
                self.remains[rows] = delta
        return float(total)

    def _pieces(self) -> Iterator[tuple[slice, slice]]:
        return pieces(self._weight, self.quantizer)


def pieces(weight: torch.Tensor, quantizer: Quantizer) -> Iterator[tuple[slice, slice]]:
    """Row ranges of ``weight`` (out, in) that are whole blocks, and the numbers of their blocks."""
    rows, columns = weight.shape
    limit = _GPU_CHUNK_ELEMENTS if weight.is_cuda else _CHUNK_ELEMENTS
    unit = quantizer.row_step(columns)
    step = max(limit // max(columns, 1) // unit, 1) * unit
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        before = (quantizer.blocks_before(row, columns) for row in (start, stop))
        yield slice(start, stop), slice(*before)


def target_of(weight: torch.Tensor, product: Product | None, rows: slice) -> torch.Tensor:
    """W - product, or beyond, float32, of a row range."""
    if product is None:
        return weight[rows].float()
    return weight[rows].float() - _reach(product, product.left[rows] @ product.right, rows)


def _reach(product: Product, delta: torch.Tensor, rows: slice) -> torch.Tensor:
    """What is subtracted of a row range whose product is ``delta``."""
    if not product.beyond:
        return delta
    if product.before is None:
        return delta * (1 + product.beyond)
    before = product.before.left[rows] @ product.before.right
    return delta + (delta - before) * product.beyond


def stored_parameters(quantized: Quantized, dtype: Stored) -> Parameters:
    """The parameters of a first pass, with scales as they are once stored: steps are shared by
    blocks of more than one row range, so codes at these scales take a second pass."""
    return Parameters(round_scales(quantized.scales, dtype), quantized.zeros)


def as_stored(values: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Float32 ``values`` rounded to ``dtype``, or as they are."""
    return values if dtype is None else values.to(dtype).float()
