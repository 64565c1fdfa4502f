"""Algorithm 1 of LoftQ (arXiv:2310.08659): alternate quantization and low-rank approximation.

    Q_t      = quantize(W - B_{t-1} A_{t-1})          B_0 A_0 = 0, or the SVD of W (svd-first)
    B_t, A_t = rank-r SVD of (W - Q_t),  B = U sqrt(S),  A = sqrt(S) V^T

Every residual is of the values as they will be stored: A and B rounded to the adapter's dtype,
scales to theirs, Q to the dense dtype where the backbone is written dense. The next step starts
from the same rounded values, so what is written is what was measured.

The passes over a matrix are in :mod:`loftq_cli.numerics.sweep`, the products in
:mod:`loftq_cli.numerics.lowrank`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch

from loftq_cli.errors import InputError
from loftq_cli.numerics import lowrank
from loftq_cli.numerics.metrics import squared_norm
from loftq_cli.numerics.native_sweep import NativeSweep
from loftq_cli.numerics.quantizers import Parameters, Quantized, Quantizer
from loftq_cli.numerics.scale_storage import ScaleDtype
from loftq_cli.numerics.sweep import Product, Sweep, TensorSweep, as_stored

Order = Literal["quantize-first", "svd-first"]
Svd = Literal["fast", "exact"]
Keep = Literal["best", "last"]


@dataclass(frozen=True)
class Settings:
    """How one matrix is decomposed.

    ``rank`` r, ``iters`` T; ``products`` is the dtype that the fast SVD's passes multiply in;
    ``scaling`` is lora_alpha / r as the consumer will apply it, folded out of B;
    ``adapter_dtype``, ``scale_dtype`` and ``backbone_dtype`` are what A and B, scales and (dense
    layout only) Q are stored as;
    ``seed`` and ``name`` seed every random draw.
    """

    rank: int
    iters: int
    order: Order = "quantize-first"
    svd: Svd = "fast"
    keep: Keep = "best"
    scaling: float = 1.0
    products: torch.dtype = torch.float32
    adapter_dtype: torch.dtype = torch.float32
    backbone_dtype: torch.dtype | None = None
    scale_dtype: ScaleDtype = "float32"
    seed: int = 0
    name: str = ""


@dataclass(frozen=True)
class Decomposition:
    """Q, A, B of one matrix and how close they are.

    ``lora_A`` (rank, in) and ``lora_B`` (out, rank) in the adapter's dtype, to be applied as
    ``scaling * B @ A``; ``residuals[t - 1]`` is ||W - Q_t - B_t A_t||_F; ``step`` the t that was
    kept (1-based, 0 when iters = 0); ``weight_norm`` ||W||_F, ``quantized_norm``
    ||W - quantize(W)||_F, ``final`` the residual of what is kept. All norms absolute.
    """

    quantized: Quantized
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    residuals: list[float]
    step: int
    weight_norm: float
    quantized_norm: float
    final: float
    scaling: float
    backbone_dtype: torch.dtype | None

    def backbone(self) -> torch.Tensor:
        """Q, float32 (out, in), decoded from the codes and the stored scales."""
        return as_stored(self.quantized.decode(), self.backbone_dtype)


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


def decompose(weight: torch.Tensor, quantizer: Quantizer, settings: Settings) -> Decomposition:
    """Split float32 ``weight`` (out, in) into a quantized backbone and a LoRA pair.

    The weight must be finite (see :func:`loftq_cli.numerics.metrics.first_non_finite`). Raises
    ScaleRangeError where a scale does not fit float16, InputError where values are too large for
    float32 arithmetic or for the dtype they are to be stored in.
    """
    weight_norm = math.sqrt(squared_norm(weight))
    sweep = make_sweep(weight, quantizer, settings)
    if settings.iters == 0:
        quantized, norm, _ = _quantize(sweep, None, settings)
        return _finish(settings, _drawn(quantized, settings), [], 0, weight_norm, norm, norm)

    previous: _Iterate | None = None
    quantized_norm = 0.0
    if settings.order == "svd-first":
        _, quantized_norm, _ = _quantize(sweep, None, settings)
        wide = weight.to(settings.products)
        A, B, _ = _fit_adapter(weight, wide, weight_norm, None, settings)
        previous = _Iterate(None, A, B)
        del wide
    basis: lowrank.Basis | None = None
    residuals: list[float] = []
    best: tuple[float, int, _Iterate] | None = None
    for step in range(1, settings.iters + 1):
        quantized, norm, adapted = _quantize(sweep, previous, settings)
        if step > 1:
            assert previous is not None
            residuals.append(adapted)
            best = _better(best, adapted, step - 1, previous, settings.keep)
        elif settings.order == "quantize-first":
            quantized_norm = norm
        A, B, basis = _fit_adapter(sweep.residual, sweep.wide, norm, basis, settings)
        previous = _Iterate(quantized, A, B)
    assert previous is not None
    residuals.append(math.sqrt(sweep.remainder(_product(previous, settings))))
    final, step, iterate = _better(best, residuals[-1], settings.iters, previous, settings.keep)
    return _finish(settings, iterate, residuals, step, weight_norm, quantized_norm, final)


def make_sweep(weight: torch.Tensor, quantizer: Quantizer, settings: Settings) -> Sweep:
    """In the compiled kernels where they can run this quantizer, else in tensor operations."""
    # The exact SVD multiplies nothing but float32.
    products = torch.float32 if settings.svd == "exact" else settings.products
    if quantizer.search() is None or weight.device.type != "cpu":
        kind: type[TensorSweep | NativeSweep] = TensorSweep
    else:
        kind = NativeSweep
    return kind(weight, quantizer, products, settings.backbone_dtype, settings.scale_dtype)


def _product(iterate: _Iterate, settings: Settings) -> Product:
    return Product(iterate.lora_B.float() * settings.scaling, iterate.lora_A.float())


def _quantize(
    sweep: Sweep, previous: _Iterate | None, settings: Settings
) -> tuple[Quantized, float, float]:
    """(Q_t, ||W - Q_t||, ||W - Q_{t-1} - B_{t-1} A_{t-1}||)."""
    if previous is None:
        swept = sweep.quantize(None, None)
    else:
        swept = sweep.quantize(previous.parameters, _product(previous, settings))
    if not math.isfinite(swept.squared):
        raise _too_large("the quantized matrix", settings.backbone_dtype or torch.float32)
    return swept.quantized, math.sqrt(swept.squared), math.sqrt(swept.previous)


def _better(
    best: tuple[float, int, _Iterate] | None,
    residual: float,
    step: int,
    iterate: _Iterate,
    keep: Keep,
) -> tuple[float, int, _Iterate]:
    if best is None or keep == "last" or residual < best[0]:
        return residual, step, iterate
    return best


def _fit_adapter(
    matrix: torch.Tensor,
    wide: torch.Tensor,
    norm: float,
    warm: lowrank.Basis | None,
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor, lowrank.Basis | None]:
    """(A, B) as stored, the rank-r approximation of ``matrix``, and the basis to carry.

    ``wide``: the matrix in the products' dtype; ``norm`` its Frobenius norm.
    """
    rank = min(settings.rank, *matrix.shape)
    try:
        if settings.svd == "exact" or not lowrank.is_thin(rank, matrix.shape):
            low = lowrank.exact(matrix, rank)
        else:
            low = lowrank.subspace(wide, norm, rank, _generator(settings, "basis"), warm)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise _too_large("a product of the values", torch.float32) from error
    out_features, in_features = matrix.shape
    B = (low.B / settings.scaling).to(settings.adapter_dtype)
    A = low.A.to(settings.adapter_dtype)
    if not bool(torch.isfinite(low.sigma).all()):
        raise _too_large("a product of the values", torch.float32)
    if not bool(torch.isfinite(A).all() & torch.isfinite(B).all()):
        raise _too_large("the adapter", settings.adapter_dtype)
    # Rounding noise is no direction: where sigma vanishes B is zero and A is drawn, because an
    # adapter with A = B = 0 cannot train.
    alive = low.sigma > 10 * torch.finfo(torch.float32).eps * low.sigma[:1]
    alive &= (A != 0).any(dim=1) | (B != 0).any(dim=0)
    if rank == settings.rank and bool(alive.all()):
        return A, B, low.basis
    left = torch.zeros(
        (out_features, settings.rank), dtype=settings.adapter_dtype, device=matrix.device
    )
    right = _kaiming(settings, in_features).to(matrix.device, settings.adapter_dtype)
    left[:, :rank] = torch.where(alive, B, left[:, :rank])
    right[:rank] = torch.where(alive[:, None], A, right[:rank])
    # A basis with dead directions would never find what the next residual has there: go cold.
    return right, left, low.basis if bool(alive.all()) else None


def _too_large(what: str, dtype: torch.dtype) -> InputError:
    wider = "" if dtype == torch.float32 else "store it in a wider dtype, or "
    return InputError(
        f"{what} is too large for {str(dtype).removeprefix('torch.')}",
        hint=f"{wider}pass the tensor through with --exclude",
    )


def _drawn(quantized: Quantized, settings: Settings) -> _Iterate:
    """LoRA's own start: B = 0, A Kaiming uniform."""
    out_features, in_features = quantized.shape
    device, dtype = quantized.codes.device, settings.adapter_dtype
    A = _kaiming(settings, in_features).to(device, dtype)
    return _Iterate(
        quantized, A, torch.zeros((out_features, settings.rank), dtype=dtype).to(device)
    )


def _kaiming(settings: Settings, in_features: int) -> torch.Tensor:
    """A as PEFT draws it, kaiming_uniform_(a=sqrt(5)): uniform in +-1/sqrt(in), (rank, in)."""
    bound = 1 / math.sqrt(in_features)
    drawn = torch.empty((settings.rank, in_features))
    return drawn.uniform_(-bound, bound, generator=_generator(settings, "adapter"))


def _generator(settings: Settings, purpose: str) -> torch.Generator:
    text = f"{settings.seed}\0{settings.name}\0{purpose}"
    digest = hashlib.sha256(text.encode()).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return generator


def _finish(
    settings: Settings,
    iterate: _Iterate,
    residuals: list[float],
    step: int,
    weight_norm: float,
    quantized_norm: float,
    final: float,
) -> Decomposition:
    assert iterate.quantized is not None
    return Decomposition(
        quantized=iterate.quantized,
        lora_A=iterate.lora_A,
        lora_B=iterate.lora_B,
        residuals=residuals,
        step=step,
        weight_norm=weight_norm,
        quantized_norm=quantized_norm,
        final=final,
        scaling=settings.scaling,
        backbone_dtype=settings.backbone_dtype,
    )
