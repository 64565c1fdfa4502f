"""Algorithm 1 of LoftQ (arXiv:2310.08659): alternate quantization and low-rank approximation.

    Q_t      = quantize(W - B_{t-1} A_{t-1})          B_0 A_0 = 0, or the SVD of W (svd-first)
    B_t, A_t = rank-r SVD of (W - Q_t),  B = U sqrt(S),  A = sqrt(S) V^T

Every residual is of the values as they will be stored: A and B rounded to the adapter's dtype,
scales to theirs, Q to the dense dtype where the backbone is written dense. The next step starts
from the same rounded values, so what is written is what was measured.

A matrix is swept in row ranges that fit the cache; beside W only R = W - Q is held in float32.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from loftq_cli.errors import InputError
from loftq_cli.numerics import lowrank
from loftq_cli.numerics.metrics import squared_norm
from loftq_cli.numerics.quantizers import Parameters, Quantized, Quantizer

Order = Literal["quantize-first", "svd-first"]
Svd = Literal["fast", "exact"]
Keep = Literal["best", "last"]

_CHUNK_ELEMENTS = 1 << 19  # a few float32 copies of it stay in a CPU's caches
_GPU_CHUNK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Settings:
    """How one matrix is decomposed.

    ``rank`` r, ``iters`` T; ``products`` is the dtype that the fast SVD's passes multiply in;
    ``scaling`` is lora_alpha / r as the consumer will apply it, folded out of B;
    ``adapter_dtype`` and ``backbone_dtype`` are what A, B and (dense layout only) Q are stored as;
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
        return _as_stored(self.quantized.decode(), self.backbone_dtype)


@dataclass
class _Iterate:
    """(Q_t, A_t, B_t) as stored; svd-first's zeroth has no Q, a fresh one no adapter yet."""

    quantized: Quantized | None = None
    lora_A: torch.Tensor | None = None
    lora_B: torch.Tensor | None = None

    @property
    def parameters(self) -> Parameters | None:
        if self.quantized is None:
            return None
        return Parameters(self.quantized.scales, self.quantized.zeros)


@dataclass
class _Sums:
    """Squared norms gathered during a sweep."""

    quantized: float = 0.0
    adapted: float = 0.0


@dataclass
class _Work:
    """The buffers of one decomposition: W, R = W - Q, and the iterates worth keeping."""

    weight: torch.Tensor
    quantizer: Quantizer
    settings: Settings
    residual: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.residual = torch.empty_like(self.weight)

    def pieces(self) -> Iterator[slice]:
        rows, columns = self.weight.shape
        limit = _GPU_CHUNK_ELEMENTS if self.weight.is_cuda else _CHUNK_ELEMENTS
        unit = self.quantizer.row_step(columns)
        step = max(limit // max(columns, 1) // unit, 1) * unit
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

    def product(self, rows: slice, iterate: _Iterate | None) -> torch.Tensor | None:
        """scaling * B A of a row range, from the stored values."""
        if iterate is None or iterate.lora_A is None or iterate.lora_B is None:
            return None
        left = iterate.lora_B[rows].float() * self.settings.scaling
        return left @ iterate.lora_A.float()

    def targets(self, previous: _Iterate | None) -> Iterator[torch.Tensor]:
        """W - (previous product), piece by piece."""
        for rows in self.pieces():
            product = self.product(rows, previous)
            yield self.weight[rows] if product is None else self.weight[rows] - product

    def quantize(self, previous: _Iterate | None, sums: _Sums) -> _Iterate:
        """Quantize W - (previous product) into a new iterate and leave R = W - Q behind.

        ``sums.adapted`` receives the previous iterate's squared residual, which is the old R less
        the same product, and ``sums.quantized`` the new R's.
        """
        columns = self.weight.shape[1]
        start = None if previous is None else previous.parameters
        quantizer = self.quantizer.prepare(lambda: self.targets(previous))
        codes = torch.empty(self.weight.shape, dtype=torch.uint8, device=self.weight.device)
        parts: list[Parameters] = []
        for rows in self.pieces():
            weight, residual = self.weight[rows], self.residual[rows]
            product = self.product(rows, previous)
            target = weight
            if product is not None:
                target = weight - product
                sums.adapted += squared_norm(residual.sub_(product))
            blocks = slice(
                quantizer.blocks_before(rows.start, columns),
                quantizer.blocks_before(rows.stop, columns),
            )
            fitted = quantizer.fit(target, None if start is None else start[blocks])
            codes[rows] = fitted.codes
            parts.append(fitted.parameters)
            values = _as_stored(fitted.values, self.settings.backbone_dtype)
            torch.sub(weight, values, out=residual)
            sums.quantized += squared_norm(residual)
        if not math.isfinite(sums.quantized):
            raise _too_large("the quantized matrix", self.settings.backbone_dtype or torch.float32)
        return _Iterate(quantizer.assemble(codes, Parameters.join(parts)))

    def adapted_norm(self, iterate: _Iterate) -> float:
        """||R - scaling * B A||_F."""
        total = 0.0
        for rows in self.pieces():
            product = self.product(rows, iterate)
            assert product is not None
            total += squared_norm(torch.sub(self.residual[rows], product, out=product))
        return math.sqrt(total)


def decompose(weight: torch.Tensor, quantizer: Quantizer, settings: Settings) -> Decomposition:
    """Split float32 ``weight`` (out, in) into a quantized backbone and a LoRA pair.

    The weight must be finite (see :func:`loftq_cli.numerics.metrics.first_non_finite`). Raises
    ScaleRangeError where a scale does not fit float16, InputError where values are too large for
    float32 arithmetic or for the dtype they are to be stored in.
    """
    work = _Work(weight, quantizer, settings)
    weight_norm = math.sqrt(sum(squared_norm(weight[rows]) for rows in work.pieces()))
    sums = _Sums()
    if settings.iters == 0:
        iterate = work.quantize(None, sums)
        _draw_adapter(iterate, weight, settings)
        norm = math.sqrt(sums.quantized)
        return _finish(settings, iterate, [], 0, weight_norm, norm, norm)

    previous: _Iterate | None = None
    quantized_norm = 0.0
    if settings.order == "svd-first":
        work.quantize(None, sums)
        quantized_norm = math.sqrt(sums.quantized)
        previous = _Iterate()
        _fit_adapter(previous, weight, None, settings)
    basis: lowrank.Basis | None = None
    residuals: list[float] = []
    best: tuple[float, int, _Iterate] | None = None
    for step in range(1, settings.iters + 1):
        sums = _Sums()
        iterate = work.quantize(previous, sums)
        if step > 1:
            assert previous is not None
            residuals.append(math.sqrt(sums.adapted))
            best = _better(best, residuals[-1], step - 1, previous, settings.keep)
        elif settings.order == "quantize-first":
            quantized_norm = math.sqrt(sums.quantized)
        basis = _fit_adapter(iterate, work.residual, basis, settings)
        previous = iterate
    assert previous is not None
    residuals.append(work.adapted_norm(previous))
    final, step, iterate = _better(best, residuals[-1], settings.iters, previous, settings.keep)
    return _finish(settings, iterate, residuals, step, weight_norm, quantized_norm, final)


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
    iterate: _Iterate, matrix: torch.Tensor, warm: lowrank.Basis | None, settings: Settings
) -> lowrank.Basis | None:
    """Store the rank-r approximation of ``matrix`` in ``iterate``; returns the basis to carry."""
    rank = min(settings.rank, *matrix.shape)
    try:
        if settings.svd == "exact":
            low = lowrank.exact(matrix, rank)
        else:
            low = lowrank.subspace(
                matrix, rank, _generator(settings, "basis"), warm, settings.products
            )
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
    left = torch.zeros(
        (out_features, settings.rank), dtype=settings.adapter_dtype, device=matrix.device
    )
    right = _kaiming(settings, in_features).to(matrix.device, settings.adapter_dtype)
    left[:, :rank] = torch.where(alive, B, left[:, :rank])
    right[:rank] = torch.where(alive[:, None], A, right[:rank])
    iterate.lora_A, iterate.lora_B = right, left
    # A basis with dead directions would never find what the next residual has there: go cold.
    return low.basis if bool(alive.all()) else None


def _too_large(what: str, dtype: torch.dtype) -> InputError:
    wider = "" if dtype == torch.float32 else "store it in a wider dtype, or "
    return InputError(
        f"{what} is too large for {str(dtype).removeprefix('torch.')}",
        hint=f"{wider}pass the tensor through with --exclude",
    )


def _draw_adapter(iterate: _Iterate, weight: torch.Tensor, settings: Settings) -> None:
    """LoRA's own start: B = 0, A Kaiming uniform."""
    out_features, in_features = weight.shape
    drawn = _kaiming(settings, in_features).to(weight.device)
    iterate.lora_A = drawn.to(settings.adapter_dtype)
    iterate.lora_B = torch.zeros(
        (out_features, settings.rank), dtype=settings.adapter_dtype, device=weight.device
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


def _as_stored(values: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return values if dtype is None else values.to(dtype).float()


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
    assert iterate.lora_A is not None
    assert iterate.lora_B is not None
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
