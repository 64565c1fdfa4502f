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
With ``feedback`` and a full H the last step goes on: it quantizes W - B_T A_T at the scales it has,
with each column's error fed back to those that come after it
(:mod:`loftq_cli.numerics.feedback`), and fits the adapter to that; and so again, if more passes are
asked for, at scales that are refit in between (:mod:`loftq_cli.numerics.refit`). If this leaves
more, the step remains what it was.

The passes over a matrix are in :mod:`loftq_cli.numerics.sweep`, the products in
:mod:`loftq_cli.numerics.lowrank`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from loftq_cli.numerics import lowrank
from loftq_cli.numerics.decomposition import Decomposition, Keep, Norms, Procedure
from loftq_cli.numerics.feedback import make_feedback, requantize
from loftq_cli.numerics.left import Left
from loftq_cli.numerics.lora import drawn_adapter, fit_adapter, too_large
from loftq_cli.numerics.metrics import squared_norm
from loftq_cli.numerics.native_sweep import NativeSweep
from loftq_cli.numerics.quantizers.base import Quantizer
from loftq_cli.numerics.quantizers.blocks import Parameters, Quantized
from loftq_cli.numerics.refit import can_refit, refit_scales
from loftq_cli.numerics.sweep import Product, Sweep, TensorSweep, as_stored, pieces
from loftq_cli.numerics.weighting import Weighting

_BEYOND_AT_FIRST, _BEYOND = 0.5, 0.7

_SAMPLED = 512
"""Rows that the weighted norm of a step in the middle is estimated from, at least; all of a matrix
with less than twice as many."""


@dataclass
class _Iterate:
    """(Q_t, A_t, B_t) as stored; svd-first's zeroth has no Q."""

    quantized: Quantized | None
    lora_A: torch.Tensor
    lora_B: torch.Tensor

    @property
    def parameters(self) -> Parameters | None:
        if self.quantized is None:
            return None
        return Parameters(self.quantized.scales, self.quantized.zeros)


@dataclass
class _Trace:
    """Norms as they are found."""

    weight: float
    quantized: float = 0.0
    steps: list[float] = field(default_factory=list)

    def norms(self, step: int) -> Norms:
        """With iterate ``step`` kept."""
        final = self.steps[step - 1] if step else self.quantized
        return Norms(self.weight, self.quantized, self.steps, final)


class _WeightedTrace(_Trace):
    """Norms in ||.||_H, found from the residual that a sweep leaves.

    That of the first step is exact. Of tall matrices the later ones are estimated, unless they are
    asked for as they are: from every so many rows, by what these had of the first step's norm.
    """

    def __init__(self, weighting: Weighting, weight: torch.Tensor) -> None:
        super().__init__(weighting.norm(weight))
        self._weighting = weighting
        self._seen = False  # what quantization alone leaves
        # The diagonal's norm costs little, and of few rows an estimate is poor.
        self._stride = max(len(weight) // _SAMPLED, 1) if weighting.is_full else 1
        self._of_all = 1.0  # the first step's norm, divided by that of the sampled rows
        self._estimated: set[int] = set()

    def is_estimated(self, step: int) -> bool:
        """Whether the norm of ``step`` is an estimate."""
        return step in self._estimated

    def correct(self, step: int, norm: float) -> None:
        """The exact ``norm`` of ``step``, in the place of what was seen."""
        self.steps[step - 1] = norm
        self._estimated.discard(step)

    def see_quantized(self, residual: torch.Tensor) -> None:
        self.quantized = self._weighting.norm(residual)
        self._seen = True

    def see_step(
        self,
        remains: torch.Tensor | None,
        product: Product,
        along: torch.Tensor | None,
        *,
        exact: bool = False,
    ) -> None:
        """``remains`` = R - product; ``along``: what R has along the directions that the weighting
        keeps apart. If nothing was seen before, R is W - quantize(W)."""
        assert remains is not None
        along = _along_remains(self._weighting, along, product)
        first = not self.steps
        if self._seen and not (first or exact) and self._stride > 1:
            self.steps.append(self._of_all * self._sampled(remains, along))
            self._estimated.add(len(self.steps))
            return
        if self._seen:
            self.steps.append(self._weighting.norm(remains, along))
        else:
            left, right = product.left, product.right
            adapted, self.quantized = self._weighting.norms(remains, left, right, along)
            self.steps.append(adapted)
            self._seen = True
        if first and self._stride > 1:
            self._of_all = self.steps[0] / (self._sampled(remains, along) or 1.0)

    def _sampled(self, remains: torch.Tensor, along: torch.Tensor | None) -> float:
        """The norm of every so many rows."""
        chosen = slice(None, None, self._stride)
        return self._weighting.norm(remains[chosen], None if along is None else along[chosen])


def _along_remains(
    weighting: Weighting, along: torch.Tensor | None, product: Product
) -> torch.Tensor | None:
    """Of R - product, from what R has along the directions kept apart."""
    of_product = weighting.along(product.right)
    if along is None or of_product is None:
        return None
    return torch.addmm(along, product.left, of_product, alpha=-1)


@dataclass(frozen=True)
class _Best:
    residual: float
    step: int
    iterate: _Iterate


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
    plain = _Trace(math.sqrt(squared_norm(weight)))
    weighted = None if weighting is None else _WeightedTrace(weighting, weight)
    deciding = weighted or plain
    previous = earlier = None
    if procedure.iters == 0 or procedure.order == "svd-first":
        quantized, plain.quantized, _ = _quantize(sweep, None, procedure)
        if weighted is not None:
            weighted.see_quantized(sweep.residual)
        if procedure.iters == 0:
            drawn = _Iterate(quantized, *drawn_adapter(quantized.shape, weight.device, procedure))
            return _finish(procedure, drawn, 0, plain, weighted)
        previous = _of_the_weight(weight, plain.weight, procedure, weighting)
    basis = best = along = None
    for step in range(1, procedure.iters + 1):
        quantized, norm, adapted = _quantize(sweep, previous, procedure, earlier, step)
        if step > 1:
            assert previous is not None
            plain.steps.append(adapted)
            if weighted is not None:
                weighted.see_step(sweep.remains, _product(previous, procedure), along)
            best = _better(best, deciding.steps[-1], step - 1, previous, procedure.keep)
        elif procedure.order == "quantize-first":
            plain.quantized = norm
        along = None if weighting is None else weighting.along(sweep.residual)
        A, B, basis = fit_adapter(
            sweep.residual, sweep.narrow, norm, basis, procedure, weighting, along
        )
        earlier, previous = previous, _Iterate(quantized, A, B)
    assert previous is not None
    product = _product(previous, procedure)
    plain.steps.append(math.sqrt(sweep.remainder(product)))
    if weighted is not None and weighting is not None:
        feedback = procedure.feedback and weighting.is_full
        weighted.see_step(sweep.remains, product, along, exact=not feedback)
        if feedback:
            fed = _fed_back(sweep, weight, previous, basis, procedure, weighting)
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
            if weighted.steps[kept.step - 1] <= weighted.steps[-1]:
                best = kept
                break
    return _finish(procedure, best.iterate, best.step, plain, weighted)


def _of_the_weight(
    weight: torch.Tensor, norm: float, procedure: Procedure, weighting: Weighting | None
) -> _Iterate:
    """A_0 and B_0 of svd-first: the low-rank approximation of ``weight`` itself."""
    narrow = weight.to(procedure.products)
    A, B, _ = fit_adapter(weight.float(), narrow, norm, None, procedure, weighting)
    return _Iterate(None, A, B)


@dataclass(frozen=True)
class _Fed:
    """An iterate, its residuals, and the basis that its adapter was found with."""

    iterate: _Iterate
    plain: float
    weighted: float
    basis: lowrank.Basis | None


def _fed_back(
    sweep: Sweep,
    weight: torch.Tensor,
    iterate: _Iterate,
    basis: lowrank.Basis | None,
    procedure: Procedure,
    weighting: Weighting,
) -> _Fed | None:
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
    iterate: _Iterate,
    parameters: Parameters | None,
    basis: lowrank.Basis | None,
    procedure: Procedure,
    left: Left,
) -> _Fed | None:
    """Quantize W less the adapter of ``iterate`` at given ``parameters``, with feedback in what
    that adapter has ``left`` of the moments, and fit another."""
    assert parameters is not None
    feedback, weighting = make_feedback(left), left.weighting
    quantized, squared = requantize(
        sweep, weight, parameters, _product(iterate, procedure), feedback, procedure.backbone_dtype
    )
    if not math.isfinite(squared):
        return None
    warm = None if basis is None else replace(basis, calls=1)  # nearly every code has changed
    norm = math.sqrt(squared)
    along = weighting.along(sweep.residual)
    A, B, basis = fit_adapter(sweep.residual, sweep.narrow, norm, warm, procedure, weighting, along)
    fed = _Iterate(quantized, A, B)
    product = _product(fed, procedure)
    remainder = math.sqrt(sweep.remainder(product))
    assert sweep.remains is not None
    along = _along_remains(weighting, along, product)
    return _Fed(fed, remainder, weighting.norm(sweep.remains, along), basis)


def _refit(sweep: Sweep, iterate: _Iterate, procedure: Procedure, left: Left) -> Parameters | None:
    """The scales of ``iterate`` that are best for its codes, in the norm that feedback works in."""
    quantized, remains = iterate.quantized, sweep.remains
    if quantized is None or remains is None or not can_refit(quantized):
        return iterate.parameters
    scales = refit_scales(quantized, remains, left.whole().to(remains.dtype), procedure.scale_dtype)
    return Parameters(scales, quantized.zeros)


def _weighted_norm(
    weight: torch.Tensor,
    quantizer: Quantizer,
    iterate: _Iterate,
    procedure: Procedure,
    weighting: Weighting,
) -> float:
    """||W - Q - B A||_H of an iterate that no sweep holds any more."""
    assert iterate.quantized is not None
    product = _product(iterate, procedure)
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


def _product(iterate: _Iterate, procedure: Procedure) -> Product:
    return Product(iterate.lora_B.float() * procedure.scaling, iterate.lora_A.float())


def _quantize(
    sweep: Sweep,
    previous: _Iterate | None,
    procedure: Procedure,
    earlier: _Iterate | None = None,
    step: int = 1,
) -> tuple[Quantized, float, float]:
    """(Q_t, ||W - Q_t||, ||W - Q_{t-1} - B_{t-1} A_{t-1}||) of ``step`` t; ``earlier`` is t - 2."""
    if previous is None:
        swept = sweep.quantize(None, None)
    else:
        product = _product(previous, procedure)
        if procedure.momentum and earlier is not None:
            product = replace(product, beyond=_BEYOND, before=_product(earlier, procedure))
        elif procedure.momentum and step > 1:
            product = replace(product, beyond=_BEYOND_AT_FIRST)
        swept = sweep.quantize(previous.parameters, product)
    if not math.isfinite(swept.squared):
        raise too_large("the quantized matrix", procedure.backbone_dtype or torch.float32)
    return swept.quantized, math.sqrt(swept.squared), math.sqrt(swept.previous)


def _better(best: _Best | None, residual: float, step: int, iterate: _Iterate, keep: Keep) -> _Best:
    if best is None or keep == "last" or residual < best.residual:
        return _Best(residual, step, iterate)
    return best


def _finish(
    procedure: Procedure, iterate: _Iterate, step: int, plain: _Trace, weighted: _Trace | None
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
