"""Quantization with error feedback under second moments of which an adapter takes its part.

A column's rounding error e_j is made up for by the columns that are quantized after it, in the
norm ||E||_H^2 = tr(E H E^T). With H = U^T D U, U unit upper triangular,

    ||E||_H^2 = sum_j D_j ||e_j + sum_{k>j} U_jk e_k||^2

so the columns are taken from the last to the first, each rounded after the errors so far have been
added to it: w_j + sum_{k>j} U_jk e_k. This is GPTQ (Frantar et al., arXiv:2210.17323) in the form
of LDLQ (Chee et al., QuIP, arXiv:2307.13304): no inverse is needed.

H is what the adapter leaves of the moments (:mod:`loftq_cli.numerics.left`).

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
from loftq_cli.numerics.left import Left
from loftq_cli.numerics.metrics import squares
from loftq_cli.numerics.quantizers.base import Quantizer
from loftq_cli.numerics.quantizers.blocks import Parameters, Quantized
from loftq_cli.numerics.sweep import Product, Sweep, as_stored

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


def make_feedback(left: Left) -> Feedback:
    """The feedback for what is ``left`` of the moments.

    Raises InputError if the moments are none: not positive semidefinite.
    """
    order, ridge = left.diagonal().argsort(stable=True), left.ridge()
    device, dtype = order.device, left.weighting.narrow.dtype

    def rows_of(start: int, stop: int) -> torch.Tensor:
        return left.rows(order, start, stop, ridge)

    factor = unit_factor(rows_of, len(order), device, torch.float32, dtype)
    if factor is None:
        factor = unit_factor(rows_of, len(order), device, torch.float64, dtype)
    if factor is None:
        raise InputError(
            "the second moments of its input are not positive semidefinite",
            hint="the statistics are damaged, or no averages of x x^T: measure them again",
        )
    return Feedback(order, factor)


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
