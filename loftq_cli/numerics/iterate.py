"""What one step of the alternation comes to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loftq_cli.numerics.quantizers.blocks import Parameters, Quantized
from loftq_cli.numerics.sweep import Product


@dataclass
class Iterate:
    """(Q_t, A_t, B_t) as stored; svd-first's zeroth has no Q."""

    quantized: Quantized | None
    lora_A: torch.Tensor
    lora_B: torch.Tensor

    @property
    def parameters(self) -> Parameters | None:
        if self.quantized is None:
            return None
        return Parameters(self.quantized.scales, self.quantized.zeros)

    def product(self, scaling: float) -> Product:
        """scaling B A, in float32."""
        return Product(self.lora_B.float() * scaling, self.lora_A.float())
