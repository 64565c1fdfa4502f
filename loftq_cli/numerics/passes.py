"""Passes of error feedback after the last step of the alternation.

    Q    = quantize(W - B A) at the step's scales, each column's error fed back to later ones
    B, A = rank-r approximation of (W - Q) in ||.||_H

In every further pass the scales are refit to the codes first (:mod:`loftq_cli.numerics.refit`); how
errors are fed back is in :mod:`loftq_cli.numerics.feedback`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from loftq_cli.numerics import lowrank
from loftq_cli.numerics.decomposition import Procedure
from loftq_cli.numerics.feedback import make_feedback, requantize
from loftq_cli.numerics.iterate import Iterate
from loftq_cli.numerics.left import Left
from loftq_cli.numerics.lora import fit_adapter
from loftq_cli.numerics.quantizers.blocks import Parameters
from loftq_cli.numerics.refit import can_refit, refit_scales
from loftq_cli.numerics.sweep import Sweep
from loftq_cli.numerics.trace import along_remains
from loftq_cli.numerics.weighting import Weighting


@dataclass(frozen=True)
class Fed:
    """An iterate, its residuals, and the basis that its adapter was found with."""

    iterate: Iterate
    plain: float
    weighted: float
    basis: lowrank.Basis | None


def fed_back(
    sweep: Sweep,
    weight: torch.Tensor,
    iterate: Iterate,
    basis: lowrank.Basis | None,
    procedure: Procedure,
    weighting: Weighting,
) -> Fed | None:
    """What becomes of ``iterate`` if the quantizer follows its adapter once more, with feedback,
    and again while that leaves less, at scales that are refit in between; None if a value is too
    large for the dtype it is to be stored in."""
    fed, parameters = None, iterate.parameters
    for _ in range(procedure.feedback_passes):
        left = Left.by(weighting, iterate.lora_A.float())
        if fed is not None:
            parameters = _refit(sweep, iterate, procedure, left)
        again = _pass(sweep, weight, iterate, parameters, basis, procedure, left)
        if again is None or (fed is not None and again.weighted >= fed.weighted):
            break
        fed, iterate, basis = again, again.iterate, again.basis
    return fed


def _pass(
    sweep: Sweep,
    weight: torch.Tensor,
    iterate: Iterate,
    parameters: Parameters | None,
    basis: lowrank.Basis | None,
    procedure: Procedure,
    left: Left,
) -> Fed | None:
    """Quantize W less the adapter of ``iterate`` at given ``parameters``, with feedback in what
    that adapter has ``left`` of the moments, and fit another."""
    assert parameters is not None
    feedback, weighting = make_feedback(left), left.weighting
    quantized, squared = requantize(
        sweep,
        weight,
        parameters,
        iterate.product(procedure.scaling),
        feedback,
        procedure.backbone_dtype,
    )
    if not math.isfinite(squared):
        return None
    warm = None if basis is None else replace(basis, calls=1)  # nearly every code has changed
    norm = math.sqrt(squared)
    along = weighting.along(sweep.residual)
    A, B, basis = fit_adapter(sweep.residual, sweep.narrow, norm, warm, procedure, weighting, along)
    fed = Iterate(quantized, A, B)
    product = fed.product(procedure.scaling)
    remainder = math.sqrt(sweep.remainder(product))
    assert sweep.remains is not None
    along = along_remains(weighting, along, product)
    return Fed(fed, remainder, weighting.norm(sweep.remains, along), basis)


def _refit(sweep: Sweep, iterate: Iterate, procedure: Procedure, left: Left) -> Parameters | None:
    """The scales of ``iterate`` that are best for its codes, in the norm that feedback works in."""
    quantized, remains = iterate.quantized, sweep.remains
    if quantized is None or remains is None or not can_refit(quantized):
        return iterate.parameters
    scales = refit_scales(quantized, remains, left.whole().to(remains.dtype), procedure.scale_dtype)
    return Parameters(scales, quantized.zeros)
