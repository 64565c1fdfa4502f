"""The best rank-r approximation of a residual: exact SVD, or subspace iteration.

Subspace iteration (Halko, Martinsson, Tropp, arXiv:0909.4061, algorithm 4.4) multiplies the matrix
by thin ones only and orthonormalises at every half step. The first call starts from a random
basis; later calls of the same alternation start from the basis that the previous one ended with,
which is close, because the residual changes little from step to step. What is carried is the
orthonormal basis, never V*sqrt(sigma): its columns keep their weight however small their sigma.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

COLD_PASSES = 4
WARM_PASSES = 2
MIN_OVERSAMPLING = 16


@dataclass(frozen=True)
class LowRank:
    """``B @ A`` approximates the matrix; ``basis`` (in, k) float32 orthonormal, or None (exact).

    ``sigma`` float32 (rank,) descending; ``B`` = U sqrt(sigma) (out, rank); ``A`` = sqrt(sigma) V^T
    (rank, in).
    """

    A: torch.Tensor
    B: torch.Tensor
    sigma: torch.Tensor
    basis: torch.Tensor | None


def exact(matrix: torch.Tensor, rank: int) -> LowRank:
    """Rank-``rank`` truncation of the full SVD of float32 (out, in), rank <= min side."""
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    return _split(left[:, :rank], sigma[:rank], right[:rank], None)


def subspace(
    matrix: torch.Tensor,
    rank: int,
    generator: torch.Generator,
    warm: torch.Tensor | None = None,
) -> LowRank:
    """Rank-``rank`` approximation of float32 (out, in), rank <= min side.

    ``warm``: an orthonormal basis of (nearly) the leading row space, (in, k), from an earlier
    call; None draws one from ``generator`` (a CPU generator, so that every device starts alike).
    """
    rows, columns = matrix.shape
    width = min(rank + max(MIN_OVERSAMPLING, rank), rows, columns)
    if warm is None:
        start = torch.randn((columns, width), generator=generator, dtype=torch.float32)
        right = start.to(matrix.device)
        passes = COLD_PASSES
    else:
        right = warm
        passes = WARM_PASSES
    left = _orthonormal(matrix @ right)
    for _ in range(passes - 1):
        right = _orthonormal(matrix.T @ left)
        left = _orthonormal(matrix @ right)
    # matrix ~ left @ small; the SVD of the thin `small` is that of its triangular factor.
    basis, triangle = torch.linalg.qr(matrix.T @ left)
    inner_left, sigma, inner_right = torch.linalg.svd(triangle.T, full_matrices=False)
    right_vectors = (basis @ inner_right.T).contiguous()
    return _split(
        left @ inner_left[:, :rank], sigma[:rank], right_vectors[:, :rank].T, right_vectors
    )


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    basis: torch.Tensor = torch.linalg.qr(columns).Q
    return basis


def _split(
    left: torch.Tensor, sigma: torch.Tensor, right: torch.Tensor, basis: torch.Tensor | None
) -> LowRank:
    root = sigma.sqrt()
    return LowRank((root[:, None] * right).contiguous(), (left * root).contiguous(), sigma, basis)
