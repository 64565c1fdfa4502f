"""Layout ``given``: a matrix as somebody else's quantizer, or nobody's, stored it.

What its tensors are is in the manifest (``held``), and how they are decoded in
:mod:`loftq_cli.checkpoint.decoding`. Nothing is written in it: a conversion cannot ask for it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loftq_cli.checkpoint.decoding.find import decoded_alone
from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.families.kinds import turned
from loftq_cli.layouts.base import Layout, Matrix
from loftq_cli.numerics.quantizers.blocks import Quantized

DENSE = "dense"
"""The form of a matrix that is stored as its values."""


class GivenLayout(Layout):
    """A matrix of a backbone that was there before."""

    name = "given"
    imports = ("transformers", "peft")
    holds_experts = True
    holds_codes = False
    keeps_conv1d = True

    def specs(self, matrix: Matrix) -> list[TensorSpec]:
        assert matrix.held is not None
        return list(matrix.held.specs)

    def encode(self, matrix: Matrix, quantized: Quantized) -> dict[str, torch.Tensor]:
        raise NotImplementedError(self.name)

    def decode(self, matrix: Matrix, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        held = matrix.held
        assert held is not None
        if held.form == DENSE:
            return turned(tensors[held.specs[0].name].float(), matrix.kind).contiguous()
        own = {spec.name: tensors[spec.name] for spec in held.specs}
        values = decoded_alone(own, held.stated, held.dtype).float()
        return values if values.shape == matrix.shape else values.T.contiguous()


LAYOUT = GivenLayout
