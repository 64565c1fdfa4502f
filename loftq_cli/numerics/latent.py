"""A quantized matrix and its adapter as parameters that can be trained, and back again.

What a model multiplies with is ``W = Q + scaling * B A``. Trained are A, B, a factor for each
scale (its logarithm), and a latent value for each code, in steps of the code: what is stored is
the nearest code, and the gradient goes past the rounding of codes and scales (straight through).
Zero points and levels stay. The gradient of a loss for W, which any model gives for its weight, is
all that is needed (:meth:`Latent.pull`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from loftq_cli.numerics.quantizers.blocks import Quantized, nonzero
from loftq_cli.numerics.quantizers.scale_storage import Stored, rounding_like

MARGIN = 0.05
"""How far from the border of a code's bin, in steps, its latent value begins at least."""
MOST = math.log(2.0)
"""The logarithm of what a scale is multiplied or divided by at most."""


@dataclass(frozen=True)
class Pair:
    """A (rank, in) and B (out, rank), float32, and the factor of their product."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float

    @property
    def product(self) -> torch.Tensor:
        """What is added to Q, float32 (out, in)."""
        return (self.scaling * self.lora_B) @ self.lora_A


class Fixed:
    """The trainable form of a matrix whose Q, float32 (out, in), stays: only its pair is trained.
    ``parameters`` by name: "A", "B"."""

    def __init__(self, values: torch.Tensor, pair: Pair) -> None:
        self._values, self._pair = values, pair
        self.parameters = {"A": pair.lora_A.clone(), "B": pair.lora_B.clone()}

    @property
    def pair(self) -> Pair:
        """A and B as they are now."""
        return replace(self._pair, lora_A=self.parameters["A"], lora_B=self.parameters["B"])

    def weight(self) -> torch.Tensor:
        """W, float32 (out, in)."""
        return self._with_product(self._values.clone())

    def pull(self, grad: torch.Tensor) -> dict[str, torch.Tensor]:
        """The gradient for every parameter, given that for W as :meth:`weight` last gave it,
        float32 (out, in)."""
        A, B = self.parameters["A"], self.parameters["B"]
        found = {"A": B.T @ grad, "B": grad @ A.T}
        return {name: gradient.mul_(self._pair.scaling) for name, gradient in found.items()}

    def settle(self) -> None:
        """Keep the parameters in their range, after a step."""

    def _with_product(self, values: torch.Tensor) -> torch.Tensor:
        """``values``, to which the pair's product is added in place."""
        A, B = self.parameters["A"], self.parameters["B"]
        return values.addmm_(B, A, alpha=self._pair.scaling)


class Scaled(Fixed):
    """The trainable form of ``quantized``, whose codes stay, and its ``pair``. ``parameters`` by
    name: "A", "B", "scales" (blocks,). ``stored``: what scales are rounded to."""

    def __init__(self, quantized: Quantized, pair: Pair, stored: Stored = "float32") -> None:
        super().__init__(quantized.scales, pair)
        self._start = quantized
        self._rounded_scales = rounding_like(quantized.scales, stored)
        self._units = self._blocks(quantized.unscaled())  # what scales are multiplied with
        self.parameters["scales"] = torch.zeros_like(quantized.scales)

    def weight(self) -> torch.Tensor:
        return self._with_product(self._flat(self._units * self.scales()[:, None]))

    def scales(self) -> torch.Tensor:
        """The scales as they are stored, float32 (blocks,)."""
        return self._rounded_scales(self._start.scales * self.parameters["scales"].exp())

    def pull(self, grad: torch.Tensor) -> dict[str, torch.Tensor]:
        gradient = torch.linalg.vecdot(self._units, self._blocks(grad))
        return {**super().pull(grad), "scales": gradient.mul_(self.scales())}

    def settle(self) -> None:
        self.parameters["scales"].clamp_(-MOST, MOST)

    def quantized(self) -> Quantized:
        """Codes and scales as they are now."""
        return replace(self._start, scales=self.scales())

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        """One value a block to one an element, (out, in)."""
        size = self._size()
        return self._flat(values.view(-1, 1).expand(-1, size))

    def _size(self) -> int:
        return self._start.block_size or self._lines()[1]

    def _lines(self) -> tuple[int, int]:
        """What blocks run along: the rows, or all of a flattened matrix."""
        rows, columns = self._start.shape
        return (rows, columns) if self._start.levels is None else (1, rows * columns)

    def _blocks(self, elements: torch.Tensor) -> torch.Tensor:
        """(blocks, size) of (out, in), zeros behind short ones."""
        size, lines = self._size(), elements.reshape(self._lines())
        missing = -lines.shape[1] % size
        if missing:
            lines = torch.nn.functional.pad(lines, (0, missing))
        return lines.reshape(-1, size)

    def _flat(self, blocks: torch.Tensor) -> torch.Tensor:
        """(out, in) of (blocks, size)."""
        rows, columns = self._lines()
        return blocks.reshape(rows, -1)[:, :columns].reshape(self._start.shape)


class Latent(Scaled):
    """The same with codes that are trained: ``parameters`` has "codes" (out, in) too."""

    def __init__(
        self,
        quantized: Quantized,
        pair: Pair,
        original: torch.Tensor | None = None,
        stored: Stored = "float32",
    ) -> None:
        """``original``, float32 (out, in): what W is to be like. Latent values begin where it
        lies in the bin of today's code, without it in the middle."""
        super().__init__(quantized, pair, stored)
        self._step = _spacing(quantized)
        low, high = self._bins()
        self._range = float(low.min()), float(high.max())
        self.parameters["codes"] = self._begin(original)

    def _begin(self, original: torch.Tensor | None) -> torch.Tensor:
        held = self._start
        if original is None:
            return self._positions()[held.codes.long()]
        target = original - self._pair.product
        scales = self._spread(nonzero(held.scales))
        wanted = target / scales / self._step
        if held.zeros is not None:
            wanted = wanted + self._spread(held.zeros.float())
        low, high = self._bins()
        margin = MARGIN * (high - low)
        codes = held.codes.long()
        return wanted.clamp((low + margin)[codes], (high - margin)[codes])

    def weight(self) -> torch.Tensor:
        self._units = self._unscaled()
        return super().weight()

    def codes(self) -> torch.Tensor:
        """The codes as they are stored, uint8 (out, in)."""
        latent, held = self.parameters["codes"], self._start
        if held.levels is None:
            return self._rounded(latent).to(torch.uint8)
        order = held.levels.argsort()
        borders = self._bins()[1][order][:-1].contiguous()
        return order.to(torch.uint8)[torch.bucketize(latent, borders)]

    def pull(self, grad: torch.Tensor) -> dict[str, torch.Tensor]:
        scales = (self.scales() * self._step)[:, None]
        return {**super().pull(grad), "codes": self._flat(self._blocks(grad) * scales)}

    def settle(self) -> None:
        super().settle()
        self.parameters["codes"].clamp_(*self._range)

    def quantized(self) -> Quantized:
        return replace(super().quantized(), codes=self.codes())

    def _positions(self) -> torch.Tensor:
        """The latent value in the middle of each code's bin."""
        held = self._start
        if held.levels is None:
            return torch.arange(2**held.bits, dtype=torch.float32, device=held.codes.device)
        return held.levels / self._step

    def _bins(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the latent values of each code begin and end: half way to the next one's, and half
        a step beyond the outermost."""
        ordered, order = self._positions().sort()
        borders = (ordered[1:] + ordered[:-1]) / 2
        low, high = torch.empty_like(ordered), torch.empty_like(ordered)
        low[order] = torch.cat([ordered[:1] - 0.5, borders])
        high[order] = torch.cat([borders, ordered[-1:] + 0.5])
        return low, high

    def _unscaled(self) -> torch.Tensor:
        """What scales are multiplied with, of the codes as they are now, (blocks, size)."""
        held = self._start
        if held.levels is not None:
            return self._blocks(held.levels[self.codes().int()])
        assert held.zeros is not None
        rounded = self._rounded(self.parameters["codes"])
        return self._blocks(rounded).sub_(held.zeros.float()[:, None])

    def _rounded(self, latent: torch.Tensor) -> torch.Tensor:
        """The nearest codes, evenly spaced ones, as float32."""
        return latent.round().clamp_(0, 2**self._start.bits - 1)


def _spacing(quantized: Quantized) -> float:
    """The mean distance of neighbouring codes' values, of a scale of 1."""
    if quantized.levels is None:
        return 1.0
    span = float(quantized.levels.max() - quantized.levels.min())
    return span / (len(quantized.levels) - 1) or 1.0
