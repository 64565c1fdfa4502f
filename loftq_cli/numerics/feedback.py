"""Quantization with error feedback under second moments of which an adapter takes its part.

A column's rounding error e_j is made up for by the columns that are quantized after it, in the
norm ||E||_H^2 = tr(E H E^T). With H = U^T D U, U unit upper triangular,

    ||E||_H^2 = sum_j D_j ||e_j + sum_{k>j} U_jk e_k||^2

so the columns are taken from the last to the first, each rounded after the errors so far have been
added to it: w_j + sum_{k>j} U_jk e_k. This is GPTQ (Frantar et al., arXiv:2210.17323) in the form
of LDLQ (Chee et al., QuIP, arXiv:2307.13304): no inverse is needed.

An adapter is fitted to what is left. With the rows of A held, B takes everything that lies in their
span, and of H remains

    H - H A^T (A H A^T)^-1 A H

for the errors to be small in. Nine tenths of that difference are subtracted: an adapter that was
to take all of the error along the largest directions would have to be right about them to the last
digit, on other text as well. A ridge of a tenth of the mean moment keeps feedback from
compensating along directions that hardly occurred (docs/algorithm.md has the measurements).

Scales and zero points are given. The columns with the largest moments come first: what is left of
them the others can still make up for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from loftq_cli.errors import InputError
from loftq_cli.numerics import native_feedback
from loftq_cli.numerics.cholesky import unit_factor
from loftq_cli.numerics.fused_panel import fused_panel
from loftq_cli.numerics.metrics import squares
from loftq_cli.numerics.quantizers.base import Quantizer
from loftq_cli.numerics.quantizers.blocks import TINY, Parameters, Quantized
from loftq_cli.numerics.sweep import Product, Sweep, as_stored
from loftq_cli.numerics.weighting import Weighting

_ABSORBED = 0.9  # of what the adapter can take
_RIDGE = 0.1  # of the mean moment
_PANEL = 64  # columns between two products with all errors so far
_CHUNK_ELEMENTS = 1 << 23  # of a matrix: rows are independent
_GPU_CHUNK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Feedback:
    """How errors are fed back to a matrix with ``in`` columns.

    ``order`` int64 (in,): the columns' numbers, quantized from the last of them to the first;
    ``factor`` (in, in), unit upper triangular in that order: U, in the dtype to multiply in.
    """

    order: torch.Tensor
    factor: torch.Tensor


def make_feedback(weighting: Weighting, lora_A: torch.Tensor) -> Feedback:
    """The feedback under full second moments, before an adapter with rows near those of
    ``lora_A`` float32 (r, in).

    Raises InputError if the moments are none: not positive semidefinite.
    """
    moments = weighting.moments
    taken = _taken(moments, lora_A)
    diagonal = moments.diagonal() - _ABSORBED * taken.square().sum(dim=0)
    order = diagonal.argsort(stable=True)
    added = _RIDGE * diagonal.mean()

    def rows_of(start: int, stop: int) -> torch.Tensor:
        """What the adapter leaves of the moments, of rows [start, stop) from their diagonal on."""
        rows = moments.index_select(0, order[start:stop]).index_select(1, order[start:])
        chosen = taken.index_select(1, order[start:])
        rows.addmm_(chosen[:, : stop - start].T, chosen, alpha=-_ABSORBED)
        rows.diagonal().add_(added)
        return rows

    dtype = weighting.narrow.dtype
    factor = unit_factor(rows_of, len(order), moments.device, torch.float32, dtype)
    if factor is None:
        factor = unit_factor(rows_of, len(order), moments.device, torch.float64, dtype)
    if factor is None:
        raise InputError(
            "the second moments of its input are not positive semidefinite",
            hint="the statistics are damaged, or no averages of x x^T: measure them again",
        )
    return Feedback(order, factor)


def left_by(weighting: Weighting, lora_A: torch.Tensor) -> torch.Tensor:
    """What an adapter with rows near those of ``lora_A`` float32 (r, in) leaves of full moments,
    with the ridge: what errors are small in after feedback; float32 (in, in)."""
    taken = _taken(weighting.moments, lora_A)
    left = torch.addmm(weighting.moments, taken.T, taken, alpha=-_ABSORBED)
    left.diagonal().add_(_RIDGE * left.diagonal().mean())
    return left


def _taken(moments: torch.Tensor, lora_A: torch.Tensor) -> torch.Tensor:
    """Z, float32 (r, in), with Z^T Z = H A^T (A H A^T)^-1 A H."""
    lengths = torch.linalg.vector_norm(lora_A, dim=1, keepdim=True)
    rows = lora_A / lengths.clamp_min(TINY)
    images = rows @ moments
    gram = (images @ rows.T).double()
    gram.diagonal().add_(1e-6 * gram.diagonal().mean().clamp_min(TINY))
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:  # far from semidefinite, which is found out about next
        return torch.zeros_like(images)
    taken: torch.Tensor = torch.linalg.solve_triangular(factor.float(), images, upper=False)
    return taken


def requantize(
    sweep: Sweep,
    weight: torch.Tensor,
    parameters: Parameters,
    product: Product,
    feedback: Feedback,
    dtype: torch.dtype | None,
) -> tuple[Quantized, float]:
    """Quantize ``weight`` (out, in) - ``product`` again, at given parameters and with feedback.

    ``dtype``: what values are rounded to, if the backbone is stored dense. Leaves R = W - Q in
    the sweep; returns Q and ||R||^2, which is not finite if a value overflowed.
    """
    order, quantizer = feedback.order, sweep.quantizer
    if native_feedback.can_run(quantizer, feedback.factor):
        codes, squared = native_feedback.requantize(
            sweep, weight, parameters, product, order, feedback.factor, dtype
        )
        return quantizer.assemble(codes, parameters), squared
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    right = product.right.T[order]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    unit = quantizer.row_step(weight.shape[1])
    # Of the trellis code every thread has rows of its own.
    units = _chunk_elements(weight.device) // weight.shape[1] // unit
    step = max(units, torch.get_num_threads()) * unit
    for start in range(0, weight.shape[0], step):
        rows = slice(start, min(start + step, weight.shape[0]))
        # Columns are kept as rows, so that each is contiguous.
        columns = weight[rows].T.contiguous()[order].float()
        columns.addmm_(right, product.left[rows].T, alpha=-1)
        chosen = _quantize_columns(quantizer, columns, rows, parameters, feedback, dtype)
        codes[rows] = chosen[back].T
        residual = torch.sub(weight[rows].float(), columns[back].T, out=sweep.residual[rows])
        total += squares(residual)
        if sweep.narrow is not sweep.residual:
            sweep.narrow[rows] = residual
    return quantizer.assemble(codes, parameters), float(total)


def working_bytes(out_features: int, in_features: int, device: torch.device, together: int) -> int:
    """About what both functions need beside the moments and the sweep; ``together``: rows that are
    quantized together."""
    most = max(_chunk_elements(device), together * torch.get_num_threads() * in_features)
    chunk = min(out_features * in_features, most)
    return 6 * in_features**2 + 12 * chunk


def _chunk_elements(device: torch.device) -> int:
    return _GPU_CHUNK_ELEMENTS if device.type == "cuda" else _CHUNK_ELEMENTS


def _quantize_columns(
    quantizer: Quantizer,
    columns: torch.Tensor,
    rows: slice,
    parameters: Parameters,
    feedback: Feedback,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """Codes uint8 (in, count) of ``columns`` float32 (in, count), these rows of a matrix in
    feedback's order, which become the values that they decode to."""
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    errors = torch.empty(columns.shape, dtype=feedback.factor.dtype, device=columns.device)
    quantize = fused_panel(quantizer, columns.device) or partial(_quantize_panel, quantizer)
    for stop in range(len(columns), 0, -_PANEL):
        panel = slice(max(stop - _PANEL, 0), stop)
        factor, targets = feedback.factor[panel], columns[panel]
        added = (factor[:, stop:] @ errors[stop:]).float()
        index = quantizer.block_index(rows, feedback.order[panel], len(columns))
        scales = parameters.scales[index].float()
        zeros = None if parameters.zeros is None else parameters.zeros[index].float()
        within = factor[:, panel].float()
        codes[panel], values = quantize(targets, added, within, scales, zeros, dtype=dtype)
        errors[panel] = targets - values
        targets.copy_(values)
    return codes


def _quantize_panel(
    quantizer: Quantizer,
    targets: torch.Tensor,
    added: torch.Tensor,
    factor: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8, values float32) of ``targets`` float32 (columns, out), each quantized after
    ``added`` and the errors of those behind it, through ``factor`` (columns, columns)."""
    codes = torch.empty(targets.shape, dtype=torch.uint8, device=targets.device)
    values, errors = torch.empty_like(targets), torch.empty_like(targets)
    begun = targets + added
    for column in reversed(range(len(targets))):
        later = slice(column + 1, None)
        wanted = begun[column] + factor[column, later] @ errors[later]
        wanted.nan_to_num_()  # after an overflow, which whoever asked finds in ||R||
        zero = None if zeros is None else zeros[column]
        codes[column], decoded = quantizer.encode_at(wanted, scales[column], zero)
        values[column] = as_stored(decoded, dtype)
        torch.sub(targets[column], values[column], out=errors[column])
    return codes, values
