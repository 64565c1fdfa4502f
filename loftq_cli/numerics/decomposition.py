"""What a decomposition is asked for, and what it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from loftq_cli.errors import InputError
from loftq_cli.numerics.quantizers.blocks import Quantized
from loftq_cli.numerics.quantizers.scale_storage import Stored
from loftq_cli.numerics.sweep import as_stored

Order = Literal["quantize-first", "svd-first"]
Svd = Literal["fast", "exact"]
Keep = Literal["best", "last"]


@dataclass(frozen=True)
class Procedure:
    """How one matrix is decomposed.

    ``rank`` r, ``iters`` T; ``products`` is the dtype that the fast SVD's passes multiply in;
    ``scaling`` is lora_alpha / r as the consumer will apply it, folded out of B;
    ``adapter_dtype``, ``scale_dtype`` and ``backbone_dtype`` are what A and B, scales and (dense
    layout only) Q are stored as;
    ``momentum``: every step goes beyond the adapter it starts from; ``feedback``: with full
    moments the last one quantizes again, ``feedback_passes`` times (see alternation); ``seed`` and
    ``name`` seed every random draw.
    """

    rank: int
    iters: int
    order: Order = "quantize-first"
    svd: Svd = "fast"
    keep: Keep = "best"
    momentum: bool = False
    feedback: bool = False
    feedback_passes: int = 1
    scaling: float = 1.0
    products: torch.dtype = torch.float32
    adapter_dtype: torch.dtype = torch.float32
    backbone_dtype: torch.dtype | None = None
    scale_dtype: Stored = "float32"
    seed: int = 0
    name: str = ""


@dataclass(frozen=True)
class Norms:
    """How close a decomposition is, in one norm, all absolute.

    ``weight`` ||W||, ``quantized`` ||W - quantize(W)||, ``steps[t - 1]`` ||W - Q_t - B_t A_t||,
    ``final`` the residual of what is kept.
    """

    weight: float
    quantized: float
    steps: list[float]
    final: float

    @property
    def are_finite(self) -> bool:
        return all(map(math.isfinite, (self.weight, self.quantized, *self.steps, self.final)))


@dataclass(frozen=True)
class Adapted:
    """A and B of one matrix and how close Q + B A is to it.

    ``lora_A`` (rank, in) and ``lora_B`` (out, rank) in the adapter's dtype, to be applied as
    ``scaling * B @ A``; ``frobenius`` the plain norms, ``weighted`` those in ||.||_H if second
    moments were given; ``step`` the t that was kept (1-based, 0 when iters = 0).
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    step: int
    frobenius: Norms
    weighted: Norms | None
    scaling: float

    def __post_init__(self) -> None:
        """Raises InputError for norms that are not finite."""
        for norms in (self.frobenius, self.weighted):
            if norms is not None and not norms.are_finite:
                raise too_large("a norm of the residual", torch.float32)


@dataclass(frozen=True)
class Decomposition(Adapted):
    """Q, A, B of one matrix and how close they are. ``backbone_dtype``: what Q itself is rounded
    to, None if codes and scales are stored."""

    quantized: Quantized
    backbone_dtype: torch.dtype | None

    @property
    def residuals(self) -> list[float]:
        """[||W - Q_t - B_t A_t||_F for t = 1..T]."""
        return self.frobenius.steps

    @property
    def weight_norm(self) -> float:
        """||W||_F."""
        return self.frobenius.weight

    @property
    def quantized_norm(self) -> float:
        """||W - quantize(W)||_F."""
        return self.frobenius.quantized

    @property
    def final(self) -> float:
        """||W - Q - B A||_F of what is kept."""
        return self.frobenius.final

    def backbone(self) -> torch.Tensor:
        """Q, float32 (out, in), decoded from the codes and the stored scales."""
        return as_stored(self.quantized.decode(), self.backbone_dtype)


def too_large(what: str, dtype: torch.dtype) -> InputError:
    wider = "" if dtype == torch.float32 else "store it in a wider dtype, or "
    return InputError(
        f"{what} is too large for {str(dtype).removeprefix('torch.')}",
        hint=f"{wider}pass the tensor through with --exclude",
    )
