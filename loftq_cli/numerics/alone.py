"""Quantization without an adapter: the scales that fit best and, under full second moments, codes
that make up for one another's rounding errors (:mod:`loftq_cli.numerics.feedback`, with nothing for
an adapter to take)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from loftq_cli.numerics.alternation import make_sweep
from loftq_cli.numerics.decomposition import Decomposition, Norms, Procedure, too_large
from loftq_cli.numerics.feedback import make_feedback, requantize
from loftq_cli.numerics.left import Left
from loftq_cli.numerics.metrics import squared_norm
from loftq_cli.numerics.quantizers.base import Quantizer
from loftq_cli.numerics.quantizers.blocks import Parameters
from loftq_cli.numerics.sweep import Product
from loftq_cli.numerics.weighting import Weighting


def quantize(
    weight: torch.Tensor,
    quantizer: Quantizer,
    procedure: Procedure,
    weighting: Weighting | None = None,
) -> Decomposition:
    """Q of ``weight`` (out, in), finite, of any 16- or 32-bit dtype, and an adapter of rank 0.

    Of its norms ``quantized`` is ||W - quantize(W)||, and ``final`` what is left with
    ``procedure.feedback`` under full moments, if that is less in ||.||_H. Raises as
    :func:`loftq_cli.numerics.alternation.decompose`.
    """
    sweep = make_sweep(weight, quantizer, procedure)
    swept = sweep.quantize(None, None)
    if not math.isfinite(swept.squared):
        raise too_large("the quantized matrix", procedure.backbone_dtype or torch.float32)
    rows, columns = weight.shape
    dtype, device = procedure.adapter_dtype, weight.device
    lora_A = torch.zeros((0, columns), dtype=dtype, device=device)
    lora_B = torch.zeros((rows, 0), dtype=dtype, device=device)
    left = math.sqrt(swept.squared)
    plain = Norms(math.sqrt(squared_norm(weight)), left, [], left)
    quantized, weighted = swept.quantized, None
    if weighting is not None:
        left = weighting.norm(sweep.residual)
        weighted = Norms(weighting.norm(weight.float()), left, [], left)
        if procedure.feedback and weighting.is_full:
            parameters = Parameters(quantized.scales, quantized.zeros)
            nothing = Product(lora_B.float(), lora_A.float())
            feedback = make_feedback(Left.by(weighting, nothing.right))
            fed, squared = requantize(
                sweep, weight, parameters, nothing, feedback, procedure.backbone_dtype
            )
            if math.isfinite(squared) and weighting.norm(sweep.residual) < weighted.final:
                quantized, weighted = fed, replace(weighted, final=weighting.norm(sweep.residual))
                plain = replace(plain, final=math.sqrt(squared))
    return Decomposition(
        quantized=quantized,
        lora_A=lora_A,
        lora_B=lora_B,
        step=0,
        frobenius=plain,
        weighted=weighted,
        scaling=procedure.scaling,
        backbone_dtype=procedure.backbone_dtype,
    )
