"""A linear layer whose weight stays packed in memory.

Every forward and every backward decodes the weight anew and lets it go: that costs a decode per
pass, and saves keeping 16 or 32 bits per weight alive between them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from loftq_cli.loading.packed_weight import PackedFormat, PackedTensors, PackedWeight, dense


class PackedLinear(PackedWeight, nn.Linear):
    """``y = x @ dequantize(weight).T + bias`` for a packed weight (see PackedWeight).

    ``bias`` (out,) or None, moved to other dtypes as any. Input (..., in) of any floating dtype,
    output (..., out) in the input's dtype, or autocast's. Gradients reach the input and the bias.
    Raises TypeError for an input of integers: model code that casts to the dtype of ``weight``
    would otherwise pass rounded activations.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        packing: PackedFormat,
        bias: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        """On the meta device, to be filled by assignment; ``dtype`` is the bias's."""
        nn.Linear.__init__(self, in_features, out_features, bias=bias, device="meta", dtype=dtype)
        self.hold((out_features, in_features), packing)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not input.is_floating_point():
            raise TypeError(f"PackedLinear takes floating-point input, not {input.dtype}")
        kind = input.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(input.dtype)
        output: torch.Tensor = _PackedMatmul.apply(  # type: ignore[no-untyped-call]
            input, bias, self._shape, self.packing, *self.tensors
        )
        return output


class _PackedMatmul(torch.autograd.Function):
    """``input @ weight.T + bias`` that saves the packed tensors, not the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        packing: PackedFormat,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        ctx.shape, ctx.packing = shape, packing
        weights = dense(shape, packing, input.dtype, _named(tensors))
        return functional.linear(input, weights, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = grad @ dense(ctx.shape, ctx.packing, grad.dtype, _named(ctx.saved_tensors))
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
        return grad_input, grad_bias, *(None,) * 7


def _named(tensors: Any) -> PackedTensors:
    """An autograd function is handed tensors one by one."""
    return PackedTensors(*tensors)
