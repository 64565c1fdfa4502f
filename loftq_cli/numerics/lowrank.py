"""The best rank-r approximation of a residual: exact SVD, or shifted subspace iteration.

Subspace iteration (Halko, Martinsson, Tropp, arXiv:0909.4061) multiplies the matrix by thin ones
only. Residuals of a quantization have flat spectra, on which it converges slowly; subtracting a
shift below the wanted part of the spectrum, ``(R R^T - alpha) U``, with alpha half the smallest
squared singular value found so far, doubles the rate at no cost (Feng, Yu, Xie, "Algorithm 1043:
Faster randomized SVD with dynamic shifts", ACM TOMS 2024, arXiv:2404.09276).

With a weighting H (:mod:`loftq_cli.numerics.weighting`) the product B A that is nearest in the norm
||.||_H is U U^T R, where U are the leading eigenvectors of R H R^T: the iteration multiplies by H
in between, and nothing is ever divided by it.

The first call of an alternation starts from a random basis. Later calls start from the basis that
the previous one ended with: its image under the old residual, taken through the new one, is already
one pass. The residual changes most from the first step to the second, which takes another; later
ones need none. What is carried is the orthonormal basis, never V*sqrt(sigma): its columns keep
their weight however small their sigma.

The products may be in bfloat16, if the device is faster at it. Rounding then moves the basis
and the projection by 0.4 % at most, which enters the residual squared: 1e-5 of what the adapter
holds, against a remainder of a third and more. With a weighting that is not so for the few
directions that inputs are large in, which the weighting keeps apart: what the matrix has along them
is given, and put in the place of what rounding made of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loftq_cli.numerics.weighting import Weighting

PASSES = (6, 1, 0)  # of an alternation's first call, its second, and the later ones
MIN_OVERSAMPLING = 16

_RIDGE = 1e-6  # what float32 products lose, of a Gram matrix of any condition
_FINE_RIDGE = 1e-8  # of rows that are nearly orthonormal already
_SMALLEST = 1e-37  # below this a reciprocal overflows float32


@dataclass(frozen=True)
class Basis:
    """What a call leaves to the next one, of the matrix R divided by its Frobenius norm.

    ``left`` float32 (k, out) the orthonormal rows U^T found, ``image`` (k, in) = U^T R (times H,
    with a weighting), ``edge`` the smallest of the k singular values, a scalar tensor; ``calls``
    made so far.
    """

    left: torch.Tensor
    image: torch.Tensor
    edge: torch.Tensor
    calls: int


@dataclass(frozen=True)
class LowRank:
    """``B @ A`` approximates the matrix; ``basis`` to carry, or None (exact).

    ``sigma`` float32 (rank,) descending, the singular values in the weighted norm. ``B`` (out,
    rank) has orthogonal columns, ``A`` (rank, in) is their projection of the matrix; each column of
    B is as long as its row of A: without a weighting, U sqrt(sigma) and sqrt(sigma) V^T.
    """

    A: torch.Tensor
    B: torch.Tensor
    sigma: torch.Tensor
    basis: Basis | None


def exact(matrix: torch.Tensor, rank: int, weighting: Weighting | None = None) -> LowRank:
    """Rank-``rank`` truncation of the full SVD of float32 (out, in), rank <= min side."""
    if weighting is None:
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        norm = max(float(sigma[0]), _SMALLEST)
        projected = (sigma / norm)[:rank, None] * right[:rank]
        return _balanced(left[:, :rank].T, projected, sigma[:rank], None, norm)
    root = weighting.root()
    weighted = matrix @ root if weighting.is_full else matrix * root
    left, sigma, _ = torch.linalg.svd(weighted, full_matrices=False)
    kept, norm = left[:, :rank].T, max(float(sigma[0]), _SMALLEST)
    return _balanced(kept, kept @ (matrix / norm), sigma[:rank], None, norm)


def is_thin(rank: int, shape: Sequence[int]) -> bool:
    """Whether :func:`subspace` can work on such a matrix: its basis is narrower than both sides."""
    return _width(rank) < min(shape)


def _width(rank: int) -> int:
    return rank + max(MIN_OVERSAMPLING, rank // 2)


def subspace(
    matrix: torch.Tensor,
    norm: float,
    rank: int,
    generator: torch.Generator,
    warm: Basis | None = None,
    weighting: Weighting | None = None,
    along: torch.Tensor | None = None,
) -> LowRank:
    """Rank-``rank`` approximation of ``matrix`` (out, in), which must be thin enough
    (:func:`is_thin`), in the dtype that the passes are to multiply in.

    ``norm``: its Frobenius norm. ``along``: what it has along the directions that ``weighting``
    keeps apart, before it was rounded (:meth:`Weighting.along`). ``warm``: the basis of an earlier
    call for nearly the same matrix and the same weighting; None draws one from ``generator`` (a CPU
    generator, so that every device starts alike).
    """
    # Dividing every product by the norm keeps squares of sigma inside float32's range.
    norm = max(norm, _SMALLEST)
    unit = 1 / norm

    split = None if weighting is None else weighting.split
    known = None if split is None or along is None else along.T

    # Thin matrices are kept as rows: CPU libraries multiply those faster.
    def times(thin: torch.Tensor) -> torch.Tensor:
        if split is not None and known is not None:
            return split.apart(thin, matrix, known) * unit
        return (thin.to(matrix.dtype) @ matrix.T).float() * unit

    def transposed_times(thin: torch.Tensor) -> torch.Tensor:
        product = (thin.to(matrix.dtype) @ matrix).float()
        if split is not None and known is not None:
            product.addmm_(thin @ known.T - product @ split.directions.T, split.directions)
        return product * unit

    def weighed(thin: torch.Tensor) -> torch.Tensor:
        return thin if weighting is None else weighting.times(thin)

    calls = 0 if warm is None else warm.calls
    if warm is None:
        shape = (_width(rank), matrix.shape[1])
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32)
        start, shift = times(weighed(drawn.to(matrix.device))), matrix.new_zeros(()).float()
    else:
        start, shift = times(warm.image), warm.edge.square() / 2
        if calls > 1:  # after the first change, the largest, the old left side is stale
            start -= shift * warm.left
    left, _ = _orthonormal(start, _RIDGE)
    for _ in range(PASSES[min(calls, len(PASSES) - 1)]):
        image = times(weighed(transposed_times(left))) - shift * left
        left, smallest = _orthonormal(image, _RIDGE)
        if weighting is not None:  # spectra are steep then: what is short now would stay so
            left, _ = _orthonormal(left, _FINE_RIDGE)
        shift = torch.where(smallest > shift, (shift + smallest) / 2, shift)
    left, _ = _orthonormal(left, _FINE_RIDGE)  # what the first time lost to conditioning
    left, projected, image, sigma = _turned(left, transposed_times(left), weighting)
    basis = Basis(left, image, sigma[-1], calls + 1)
    return _balanced(left[:rank], projected[:rank], sigma[:rank] / unit, basis, norm)


def _turned(
    left: torch.Tensor, projected: torch.Tensor, weighting: Weighting | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(left, projected, image, sigma), all rows turned so that they belong to the singular values
    ``sigma``, descending; ``image`` is ``projected`` as it is weighed."""
    image = projected if weighting is None else weighting.times(projected)
    inner, sigma = _eigen(projected, image)
    turn = inner.T.float()
    left, projected = turn @ left, turn @ projected
    return left, projected, projected if weighting is None else turn @ image, sigma.float()


def _eigen(rows: torch.Tensor, weighed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(left singular vectors (k, k), singular values (k,) descending), float64, of float32
    (k, n) by its Gram matrix ``rows @ weighed^T``: quick for thin ones, and good to about 3e-4 of
    the largest value, which the flat spectra of residuals stay above."""
    gram = (rows @ weighed.T).double()
    values, vectors = torch.linalg.eigh(gram)
    return vectors.flip(1), values.flip(0).clamp_min(0).sqrt()


def _orthonormal(rows: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(a basis of the row span of float32 (k, n), nearly orthonormal; about its smallest singular
    value).

    By the Cholesky factor of the Gram matrix, which a device computes without waiting for the
    host. A ``ridge``, in parts of the trace, keeps it positive if rows depend on each other;
    directions below it are left short, not blown up to one. The value is the mean of all, squared,
    weighted with their 32nd negative powers: at most a few percent too large, and zero if it is
    not above the ridge.
    """
    gram = (rows @ rows.T).double()
    added = gram.diagonal().sum() * ridge + _SMALLEST
    gram.diagonal().add_(added)
    factor, _ = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    power = inverse.T @ inverse
    for _ in range(4):
        power = power / power.diagonal().sum()
        power = power @ power
    smallest = (gram * (power @ power)).sum() / power.square().sum()
    # What is not well above the ridge is not known to be there at all.
    return inverse.float() @ rows, (smallest - 2 * added).clamp_min(0).sqrt().float()


def _balanced(
    left: torch.Tensor,
    projected: torch.Tensor,
    sigma: torch.Tensor,
    basis: Basis | None,
    norm: float,
) -> LowRank:
    """B and A from orthonormal rows ``left`` (rank, out) and ``projected`` = left @ matrix / norm,
    which would lose digits if it were multiplied by a very small norm at once."""
    lengths = torch.linalg.vector_norm(projected, dim=1, keepdim=True)
    root, share = lengths.sqrt(), math.sqrt(norm)
    # The length of a row below 1e-19 underflows to zero; the row must not be blown up for it.
    A = projected / root.clamp_min(math.sqrt(_SMALLEST)) * share
    return LowRank(A.contiguous(), (left * root).T.contiguous() * share, sigma, basis)


def fastest_products(device: torch.device) -> torch.dtype:
    """bfloat16 if ``device`` has instructions for it, else float32."""
    if device.type == "cuda":  # older ones only emulate it
        capable = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if capable else torch.float32
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if supported() else torch.float32
