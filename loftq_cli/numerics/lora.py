"""A and B of one step, as they are stored, and where they are drawn instead."""

from __future__ import annotations

import hashlib
import math

import torch

from loftq_cli.numerics import lowrank
from loftq_cli.numerics.decomposition import Procedure, too_large
from loftq_cli.numerics.weighting import Weighting


def fit_adapter(
    matrix: torch.Tensor,
    narrow: torch.Tensor,
    norm: float,
    warm: lowrank.Basis | None,
    procedure: Procedure,
    weighting: Weighting | None,
    along: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, lowrank.Basis | None]:
    """(A, B) as stored, the rank-r approximation of ``matrix``, and the basis to carry.

    ``narrow``: the matrix in the products' dtype; ``norm`` its Frobenius norm; ``along``: what it
    has along the directions that ``weighting`` keeps apart, None if that was not computed yet.
    """
    rank = min(procedure.rank, *matrix.shape)
    try:
        if procedure.svd == "exact" or not lowrank.is_thin(rank, matrix.shape):
            low = lowrank.exact(matrix, rank, weighting)
        else:
            generator = _generator(procedure, "basis")
            if along is None and weighting is not None:
                along = weighting.along(matrix)
            low = lowrank.subspace(narrow, norm, rank, generator, warm, weighting, along)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise too_large("a product of the values", torch.float32) from error
    out_features, in_features = matrix.shape
    B = (low.B / procedure.scaling).to(procedure.adapter_dtype)
    A = low.A.to(procedure.adapter_dtype)
    # Rounding noise is no direction: where sigma vanishes B is zero and A is drawn, because an
    # adapter with A = B = 0 cannot train.
    alive = low.sigma > 10 * torch.finfo(torch.float32).eps * low.sigma[:1]
    alive &= (A != 0).any(dim=1) | (B != 0).any(dim=0)
    finite = torch.isfinite(low.sigma).all()
    fits = torch.isfinite(A).all() & torch.isfinite(B).all()
    # At once: a device is waited for each time a value is read from it.
    products_finite, adapter_fits, all_alive = torch.stack((finite, fits, alive.all())).tolist()
    if not products_finite:
        raise too_large("a product of the values", torch.float32)
    if not adapter_fits:
        raise too_large("the adapter", procedure.adapter_dtype)
    if rank == procedure.rank and all_alive:
        return A, B, low.basis
    left = torch.zeros(
        (out_features, procedure.rank), dtype=procedure.adapter_dtype, device=matrix.device
    )
    right = _kaiming(procedure, in_features).to(matrix.device, procedure.adapter_dtype)
    left[:, :rank] = torch.where(alive, B, left[:, :rank])
    right[:rank] = torch.where(alive[:, None], A, right[:rank])
    # A basis with dead directions would never find what the next residual has there: go cold.
    return right, left, low.basis if all_alive else None


def drawn_adapter(
    shape: tuple[int, int], device: torch.device, procedure: Procedure
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) that LoRA itself starts from, of a matrix of ``shape``: A Kaiming uniform, B = 0."""
    out_features, in_features = shape
    dtype = procedure.adapter_dtype
    A = _kaiming(procedure, in_features).to(device, dtype)
    return A, torch.zeros((out_features, procedure.rank), dtype=dtype, device=device)


def _kaiming(procedure: Procedure, in_features: int) -> torch.Tensor:
    """A as PEFT draws it, kaiming_uniform_(a=sqrt(5)): uniform in +-1/sqrt(in), (rank, in)."""
    bound = 1 / math.sqrt(in_features)
    drawn = torch.empty((procedure.rank, in_features))
    return drawn.uniform_(-bound, bound, generator=_generator(procedure, "adapter"))


def _generator(procedure: Procedure, purpose: str) -> torch.Generator:
    text = f"{procedure.seed}\0{procedure.name}\0{purpose}"
    digest = hashlib.sha256(text.encode()).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return generator
