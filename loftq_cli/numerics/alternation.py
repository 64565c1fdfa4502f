"""Algorithm 1 of LoftQ (arXiv:2310.08659): alternate quantization and low-rank approximation.

    Q_t      = quantize(W - B_{t-1} A_{t-1})          B_0 A_0 = 0, or the SVD of W (svd-first)
    B_t, A_t = rank-r SVD of (W - Q_t),  B = U sqrt(S),  A = sqrt(S) V^T

Every residual is of the values as they will be stored: A and B rounded to the adapter's dtype,
scales to theirs, Q to the dense dtype if the backbone is written dense. The next step starts
from the same rounded values, so what is written is what was measured.

With ``momentum`` the quantizer is given more than the last step's change of the adapter: of

    Q_t      = quantize(W - X - beta (X - X'))        X = B_{t-1} A_{t-1}, X' = B_{t-2} A_{t-2}

beta is 0.5 for the first change, which begins at zero, and 0.7 for the later ones: Polyak's heavy
ball (1964). Most codes stay where they are while the adapter creeps towards them; pushed, they
change sooner. Neither step sees more than W, so the residuals mean what they mean without.

With second moments H of the layer's input the low-rank step minimises ||W - Q_t - B A||_H instead
of the Frobenius norm, and the iterate that is best in that norm is kept; the quantizer is the same.
With ``feedback`` and a full H the last step goes on (:mod:`loftq_cli.numerics.passes`). If this
leaves more, the step remains what it was.

The passes over a matrix are in :mod:`loftq_cli.numerics.sweep`, the products in
:mod:`loftq_cli.numerics.lowrank`, the norms in :mod:`loftq_cli.numerics.trace`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from loftq_cli.numerics.decomposition import Decomposition, Keep, Procedure, too_large
from loftq_cli.numerics.iterate import Iterate
from loftq_cli.numerics.lora import drawn_adapter, fit_adapter
from loftq_cli.numerics.metrics import squared_norm
from loftq_cli.numerics.native_sweep import NativeSweep
from loftq_cli.numerics.passes import fed_back
from loftq_cli.numerics.quantizers.base import Quantizer
from loftq_cli.numerics.quantizers.blocks import Quantized
from loftq_cli.numerics.sweep import Sweep, TensorSweep, as_stored, pieces
from loftq_cli.numerics.trace import Trace, WeightedTrace
from loftq_cli.numerics.weighting import Weighting

_BEYOND_AT_FIRST, _BEYOND = 0.5, 0.7


_SURE = 0.9
"""Of an estimated norm: what is less is less than the exact one, too."""


@dataclass(frozen=True)
class _Best:
    residual: float
    step: int
    iterate: Iterate


def decompose(
    weight: torch.Tensor,
    quantizer: Quantizer,
    procedure: Procedure,
    weighting: Weighting | None = None,
) -> Decomposition:
    """Split ``weight`` (out, in), of any 16- or 32-bit dtype, into a quantized backbone and a LoRA
    pair; ``weighting`` (in) on its device.

    The weight must be finite (see :func:`loftq_cli.numerics.metrics.first_non_finite`). Raises
    ScaleRangeError if a scale does not fit float16, InputError if values are too large for
    float32 arithmetic or for the dtype they are to be stored in.
    """
    sweep = make_sweep(weight, quantizer, procedure)
    if weighting is not None and procedure.iters:
        sweep.remains = torch.empty_like(sweep.narrow)
    plain = Trace(math.sqrt(squared_norm(weight)))
    weighted = None if weighting is None else WeightedTrace(weighting, weight)
    deciding = weighted or plain
    previous = earlier = None
    if procedure.iters == 0 or procedure.order == "svd-first":
        quantized, plain.quantized, _ = _quantize(sweep, None, procedure)
        if weighted is not None:
            weighted.see_quantized(sweep.residual)
        if procedure.iters == 0:
            drawn = Iterate(quantized, *drawn_adapter(quantized.shape, weight.device, procedure))
            return _finish(procedure, drawn, 0, plain, weighted)
        previous = _of_the_weight(weight, plain.weight, procedure, weighting)
    basis = best = along = None
    for step in range(1, procedure.iters + 1):
        quantized, norm, adapted = _quantize(sweep, previous, procedure, earlier, step)
        if step > 1:
            assert previous is not None
            plain.steps.append(adapted)
            if weighted is not None:
                weighted.see_step(sweep.remains, previous.product(procedure.scaling), along)
            best = _better(best, deciding.steps[-1], step - 1, previous, procedure.keep)
        elif procedure.order == "quantize-first":
            plain.quantized = norm
        along = None if weighting is None else weighting.along(sweep.residual)
        A, B, basis = fit_adapter(
            sweep.residual, sweep.narrow, norm, basis, procedure, weighting, along
        )
        earlier, previous = previous, Iterate(quantized, A, B)
    assert previous is not None
    product = previous.product(procedure.scaling)
    plain.steps.append(math.sqrt(sweep.remainder(product)))
    if weighted is not None and weighting is not None:
        feedback = procedure.feedback and weighting.is_full
        weighted.see_step(sweep.remains, product, along, exact=not feedback)
        if feedback:
            fed = fed_back(sweep, weight, previous, basis, procedure, weighting)
            close = fed is not None and fed.weighted > _SURE * weighted.steps[-1]
            if close and weighted.is_estimated(procedure.iters):
                exact = _weighted_norm(weight, sweep.quantizer, previous, procedure, weighting)
                weighted.correct(procedure.iters, exact)
            if fed is not None and fed.weighted < weighted.steps[-1]:
                previous, plain.steps[-1] = fed.iterate, fed.plain
                weighted.correct(procedure.iters, fed.weighted)
    best = _better(best, deciding.steps[-1], procedure.iters, previous, procedure.keep)
    if weighted is not None and weighting is not None:
        last = _Best(weighted.steps[-1], procedure.iters, previous)
        for kept in (best, last):
            if weighted.is_estimated(kept.step):
                exact = _weighted_norm(weight, sweep.quantizer, kept.iterate, procedure, weighting)
                weighted.correct(kept.step, exact)
        steps = weighted.steps
        best = min(best, last, key=lambda kept: steps[kept.step - 1])
    return _finish(procedure, best.iterate, best.step, plain, weighted)


def _of_the_weight(
    weight: torch.Tensor, norm: float, procedure: Procedure, weighting: Weighting | None
) -> Iterate:
    """A_0 and B_0 of svd-first: the low-rank approximation of ``weight`` itself."""
    narrow = weight.to(procedure.products)
    A, B, _ = fit_adapter(weight.float(), narrow, norm, None, procedure, weighting)
    return Iterate(None, A, B)


def _weighted_norm(
    weight: torch.Tensor,
    quantizer: Quantizer,
    iterate: Iterate,
    procedure: Procedure,
    weighting: Weighting,
) -> float:
    """||W - Q - B A||_H of an iterate that no sweep holds any more."""
    assert iterate.quantized is not None
    product = iterate.product(procedure.scaling)
    found = []
    for rows, blocks in pieces(weight, quantizer):
        values = as_stored(iterate.quantized.part(rows, blocks).decode(), procedure.backbone_dtype)
        remains = weight[rows].float() - values
        found.append(weighting.norm(remains.addmm_(product.left[rows], product.right, alpha=-1)))
    return math.hypot(*found)


def make_sweep(weight: torch.Tensor, quantizer: Quantizer, procedure: Procedure) -> Sweep:
    """In the compiled kernels if they can run this quantizer, else in tensor operations."""
    # The exact SVD multiplies nothing but float32.
    products = torch.float32 if procedure.svd == "exact" else procedure.products
    if quantizer.search() is None or weight.device.type != "cpu":
        kind: type[TensorSweep | NativeSweep] = TensorSweep
    else:
        kind = NativeSweep
    return kind(weight, quantizer, products, procedure.backbone_dtype, procedure.scale_dtype)


def _quantize(
    sweep: Sweep,
    previous: Iterate | None,
    procedure: Procedure,
    earlier: Iterate | None = None,
    step: int = 1,
) -> tuple[Quantized, float, float]:
    """(Q_t, ||W - Q_t||, ||W - Q_{t-1} - B_{t-1} A_{t-1}||) of ``step`` t; ``earlier`` is t - 2."""
    if previous is None:
        swept = sweep.quantize(None, None)
    else:
        product = previous.product(procedure.scaling)
        if procedure.momentum and earlier is not None:
            product = replace(product, beyond=_BEYOND, before=earlier.product(procedure.scaling))
        elif procedure.momentum and step > 1:
            product = replace(product, beyond=_BEYOND_AT_FIRST)
        swept = sweep.quantize(previous.parameters, product)
    if not math.isfinite(swept.squared):
        raise too_large("the quantized matrix", procedure.backbone_dtype or torch.float32)
    return swept.quantized, math.sqrt(swept.squared), math.sqrt(swept.previous)


def _better(best: _Best | None, residual: float, step: int, iterate: Iterate, keep: Keep) -> _Best:
    if best is None or keep == "last" or residual < best.residual:
        return _Best(residual, step, iterate)
    return best


def _finish(
    procedure: Procedure, iterate: Iterate, step: int, plain: Trace, weighted: Trace | None
) -> Decomposition:
    assert iterate.quantized is not None
    return Decomposition(
        quantized=iterate.quantized,
        lora_A=iterate.lora_A,
        lora_B=iterate.lora_B,
        step=step,
        frobenius=plain.norms(step),
        weighted=None if weighted is None else weighted.norms(step),
        scaling=procedure.scaling,
        backbone_dtype=procedure.backbone_dtype,
    )
