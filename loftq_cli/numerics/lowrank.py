"""The best rank-r approximation of a residual: exact SVD, or shifted subspace iteration.

Subspace iteration (Halko, Martinsson, Tropp, arXiv:0909.4061) multiplies the matrix by thin ones
only. Residuals of a quantization have flat spectra, on which it converges slowly; subtracting a
shift below the wanted part of the spectrum, ``(R^T R - alpha) V``, with alpha half the smallest
squared singular value found so far, doubles the rate at no cost (Feng, Yu, Xie, "Algorithm 1043:
Faster randomized SVD with dynamic shifts", ACM TOMS 2024, arXiv:2404.09276).

The first call of an alternation starts from a random basis. Later calls start from the basis that
the previous one ended with, and its shift: the residual changes little from step to step, one pass
is enough. What is carried is the orthonormal basis, never V*sqrt(sigma): its columns keep their
weight however small their sigma.

The products may be in bfloat16, where the device is faster at it. Rounding then moves the basis
and the projection by 0.4 % at most, which enters the residual squared: 1e-5 of what the adapter
holds, against a remainder of a third and more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

COLD_PASSES = 6
WARM_PASSES = 1
MIN_OVERSAMPLING = 16

_SMALLEST = 1e-37  # below this a reciprocal overflows float32


@dataclass(frozen=True)
class Basis:
    """What a call leaves to the next one: ``right`` float32 (in, k), orthonormal, and ``edge``,
    the smallest of its k singular values, a float32 scalar tensor."""

    right: torch.Tensor
    edge: torch.Tensor


@dataclass(frozen=True)
class LowRank:
    """``B @ A`` approximates the matrix; ``basis`` to carry, or None (exact).

    ``sigma`` float32 (rank,) descending; ``B`` = U sqrt(sigma) (out, rank); ``A`` = sqrt(sigma) V^T
    (rank, in).
    """

    A: torch.Tensor
    B: torch.Tensor
    sigma: torch.Tensor
    basis: Basis | None


def exact(matrix: torch.Tensor, rank: int) -> LowRank:
    """Rank-``rank`` truncation of the full SVD of float32 (out, in), rank <= min side."""
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    return _split(left[:, :rank], sigma[:rank], right[:rank], None)


def subspace(
    matrix: torch.Tensor,
    rank: int,
    generator: torch.Generator,
    warm: Basis | None = None,
    products: torch.dtype = torch.float32,
) -> LowRank:
    """Rank-``rank`` approximation of float32 (out, in), rank <= min side.

    ``warm``: the basis of an earlier call for nearly the same matrix; None draws one from
    ``generator`` (a CPU generator, so that every device starts alike). ``products``: the dtype in
    which the passes multiply.
    """
    rows, columns = matrix.shape
    width = rank + max(MIN_OVERSAMPLING, rank // 2)
    if width >= min(rows, columns):
        return exact(matrix, rank)
    # Dividing every product by the largest entry keeps squares of sigma inside float32's range.
    lowest, highest = matrix.aminmax()
    unit = 1 / torch.maximum(-lowest, highest).clamp_min(_SMALLEST)
    wide = matrix.to(products)

    def times(thin: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = wide @ thin.to(products)
        scaled: torch.Tensor = product.float() * unit
        return scaled

    def transposed_times(thin: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = wide.T @ thin.to(products)
        scaled: torch.Tensor = product.float() * unit
        return scaled

    if warm is None:
        start = torch.randn((rows, width), generator=generator, dtype=torch.float32)
        right, _ = _orthonormal(transposed_times(start.to(matrix.device)))
        shift = torch.zeros((), device=matrix.device)
        passes = COLD_PASSES
    else:
        right = warm.right
        shift = (warm.edge * unit).square() / 2
        passes = WARM_PASSES
    for _ in range(passes):
        right, smallest = _orthonormal(transposed_times(times(right)) - shift * right)
        shift = torch.where(smallest > shift, (shift + smallest) / 2, shift)
    left, _ = _orthonormal(times(right))
    left, _ = _orthonormal(left)  # twice: the first leaves what float32 lost to conditioning
    projected = transposed_times(left)
    inner, sigma = _eigen(projected)
    right = projected @ (inner / sigma.clamp_min(_floor(sigma))).float()
    sigma = sigma.float() / unit
    low = _split((left @ inner.float())[:, :rank], sigma[:rank], right[:, :rank].T, None)
    return LowRank(low.A, low.B, low.sigma, Basis(right, sigma[-1]))


def _eigen(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(right singular vectors (k, k), singular values (k,) descending), float64, of float32
    (n, k) by its Gram matrix: quick for thin ones, and good to about 3e-4 of the largest value,
    which the flat spectra of residuals stay above."""
    gram = (columns.T @ columns).double()
    values, vectors = torch.linalg.eigh(gram)
    return vectors.flip(1), values.flip(0).clamp_min(0).sqrt()


def _orthonormal(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(an orthonormal basis of the span of float32 (n, k), the smallest singular value)."""
    vectors, values = _eigen(columns)
    return columns @ (vectors / values.clamp_min(_floor(values))).float(), values[-1].float()


def _floor(values: torch.Tensor) -> torch.Tensor:
    """Below this a singular value is noise: its direction is left short, not blown up to one."""
    return (values[0] * 1e-6).clamp_min(_SMALLEST)


def _split(
    left: torch.Tensor, sigma: torch.Tensor, right: torch.Tensor, basis: Basis | None
) -> LowRank:
    root = sigma.sqrt()
    return LowRank((root[:, None] * right).contiguous(), (left * root).contiguous(), sigma, basis)


def fastest_products(device: torch.device) -> torch.dtype:
    """bfloat16 where ``device`` has instructions for it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if supported() else torch.float32
