"""The pair that makes up for a quantization which is given: A and B are all there is to choose.

    B, A = the rank-r matrix nearest to W - Q,  in the Frobenius norm or in ||.||_H

It is the low-rank step of :mod:`loftq_cli.numerics.alternation`, once, with twice the passes: no
later step follows that could make up for what the first left.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from loftq_cli.errors import InputError
from loftq_cli.numerics.decomposition import Adapted, Norms, Procedure
from loftq_cli.numerics.lora import fit_adapter
from loftq_cli.numerics.metrics import squared_norm
from loftq_cli.numerics.weighting import Weighting

ALIKE = 0.1
"""The least cosine of W and a quantization of it. Even one bit a weight leaves 0.8 of a normal
distribution's; two matrices that have nothing to do with each other have about zero."""


def adapt(
    weight: torch.Tensor,
    backbone: torch.Tensor,
    procedure: Procedure,
    weighting: Weighting | None = None,
) -> Adapted:
    """A and B for ``weight`` W (out, in), finite, of any 16- or 32-bit dtype, and ``backbone`` Q,
    float32 of the same shape, which is taken over.

    Of its norms ``quantized`` is ||W - Q||. Raises InputError if Q is no quantization of W, if it
    is not finite, or if a value is too large for the dtype it is to be stored in.
    """
    held = squared_norm(backbone)
    if not math.isfinite(held):
        raise InputError("the backbone has a value that is not finite", hint="it is damaged")
    residual = torch.sub(weight.float(), backbone, out=backbone)
    whole, left = squared_norm(weight), squared_norm(residual)
    if whole and held and whole + held - left < 2 * ALIKE * math.sqrt(whole * held):
        raise InputError(
            "the backbone's is no quantization of it: the two have nothing in common",
            hint="give the model that the backbone was made from",
        )
    norm = math.sqrt(left)
    narrow = residual.to(procedure.products)
    A, B, basis = fit_adapter(residual, narrow, norm, None, procedure, weighting)
    if basis is not None:
        again = replace(basis, calls=0)
        A, B, _ = fit_adapter(residual, narrow, norm, again, procedure, weighting)
    before = None if weighting is None else weighting.norm(residual)
    residual.addmm_(B.float() * procedure.scaling, A.float(), alpha=-1)
    final = math.sqrt(squared_norm(residual))
    weighted = None
    if weighting is not None and before is not None:
        after = weighting.norm(residual)
        weighted = Norms(weighting.norm(weight.float()), before, [after], after)
    plain = Norms(math.sqrt(whole), norm, [final], final)
    return Adapted(A, B, 1, plain, weighted, procedure.scaling)
