"""A weight that stays packed in memory, for the modules that replace a model's own.

What is held is what layout ``loftq`` stores (:mod:`loftq_cli.layouts.loftq`), byte for byte. On
CUDA one Triton kernel decodes, if triton is installed; torch.compile makes its own from the
tensor operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from loftq_cli.checkpoint.dtypes import tag_named, torch_dtype
from loftq_cli.checkpoint.packing import packed_length
from loftq_cli.layouts.loftq import scale_count
from loftq_cli.numerics.quantizers import trellis_code
from loftq_cli.numerics.quantizers.blocks import block_count
from loftq_cli.numerics.quantizers.decoding import decode
from loftq_cli.numerics.quantizers.packed import Packed
from loftq_cli.numerics.quantizers.scale_storage import STEP_GROUP, ScaleDtype, unpack_scales

_PACKED = ("weight", "weight_scales", "weight_scale_steps", "weight_levels", "weight_zeros")


@dataclass(frozen=True)
class PackedFormat:
    """How one matrix is packed: ``bits`` per code, ``block_size`` (0: one block for everything),
    ``decoding`` "affine", "codebook" or "trellis", and how its ``scales`` are stored."""

    bits: int
    block_size: int
    decoding: str
    scales: ScaleDtype = "float32"


class PackedTensors(NamedTuple):
    """The tensors of a packed weight, as layout ``loftq`` names them (see PackedWeight)."""

    codes: torch.Tensor
    scales: torch.Tensor
    steps: torch.Tensor | None
    zeros: torch.Tensor | None
    levels: torch.Tensor | None


class PackedWeight(nn.Module):
    """What a module of any kind with a frozen, packed weight (out, in) consists of.

    ``weight`` uint8 (ceil(out*in*bits/8),), a Parameter without gradient; ``weight_scales``
    (blocks,), float32, bfloat16, or int8 with ``weight_scale_steps`` bfloat16 (ceil(blocks/64),);
    ``weight_levels`` float32 (2**bits,) for a codebook, ``weight_zeros`` uint8 for zero points,
    neither for the trellis code.

    All of these keep their dtype whatever dtype the module is moved to: rounding scales or levels
    would change the weight that the adapter was fitted to.

    ``adapted``: an adapter is around the module, or was.
    """

    adapted = False

    weight: torch.Tensor
    weight_scales: torch.Tensor
    weight_scale_steps: torch.Tensor | None
    weight_levels: torch.Tensor | None
    weight_zeros: torch.Tensor | None

    def hold(self, shape: tuple[int, int], packing: PackedFormat) -> None:
        """Put the packed tensors, on the meta device, to be filled by assignment, in the place of
        the weight (out, in)."""
        self.packing = packing
        self._shape = shape
        bits = packing.bits
        scales = scale_count(shape, packing.block_size, packing.decoding)
        codes = _empty(packed_length(shape[0] * shape[1], bits), torch.uint8)
        steps = zeros = levels = None
        if packing.scales == "int8":
            steps = _empty(block_count(scales, STEP_GROUP), torch.bfloat16)
        if packing.decoding == "affine":
            zeros = _empty(packed_length(scales, bits), torch.uint8)
        elif packing.decoding == "codebook":
            levels = _empty(2**bits, torch.float32)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer(
            "weight_scales", _empty(scales, torch_dtype(tag_named(packing.scales)))
        )
        self.register_buffer("weight_scale_steps", steps)
        self.register_buffer("weight_levels", levels)
        self.register_buffer("weight_zeros", zeros)

    def let_go(self) -> None:
        """Hold nothing, until :meth:`take`."""
        for name in _PACKED:
            setattr(self, name, None)

    def take(self, packed: Packed) -> None:
        """Hold the tensors of ``packed``, which is of this format."""
        self.weight = nn.Parameter(packed.codes, requires_grad=False)
        self.weight_scales, self.weight_zeros = packed.scales, packed.zeros
        self.weight_levels = None if packed.is_trellis else packed.levels

    @property
    def W_q(self) -> torch.Tensor:
        """The packed codes. Where a layer has this name, PEFT asks ``dequantize()`` for the weight
        that DoRA needs, and takes the device from here."""
        return self.weight

    def dequantize(self) -> torch.Tensor:
        """The weight, float32 (out, in): exactly what the stored bytes mean."""
        return dense(self._shape, self.packing, torch.float32, self.tensors)

    @property
    def tensors(self) -> PackedTensors:
        """What is stored of the weight."""
        return PackedTensors(
            self.weight,
            self.weight_scales,
            self.weight_scale_steps,
            self.weight_zeros,
            self.weight_levels,
        )

    def reset_parameters(self) -> None:
        """Nothing: packed codes come from a checkpoint."""

    def extra_repr(self) -> str:
        packing = self.packing
        return (
            f"{super().extra_repr()}, bits={packing.bits}, block_size={packing.block_size}, "
            f"decoding={packing.decoding}, scales={packing.scales}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        packed = [getattr(self, name) for name in _PACKED]

        def keeping_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype and any(tensor is item for item in packed):
                return tensor.to(moved.device)
            return moved

        return super()._apply(keeping_dtype, recurse)  # type: ignore[no-untyped-call]


def dense(
    shape: tuple[int, int],
    packing: PackedFormat,
    dtype: torch.dtype,
    tensors: PackedTensors,
) -> torch.Tensor:
    """The weight (out, in), computed in float32 and rounded to ``dtype``."""
    codes, scales, steps, zeros, levels = tensors
    if is_described(codes):
        return codes.new_empty(shape, dtype=dtype)
    scales = unpack_scales(scales, steps)
    if packing.decoding == "trellis":
        levels = trellis_code.levels(codes.device)
    packed = Packed(shape, packing.bits, packing.block_size, codes, scales, zeros, levels)
    fused = _triton_decode() if codes.is_cuda and not torch.compiler.is_compiling() else None
    found: torch.Tensor = (fused or decode)(packed, dtype)
    return found


def is_described(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` has a shape and no values: what a step takes is counted with such
    (:mod:`loftq_cli.loading.step`). What torch.compile traces is none."""
    return not torch.compiler.is_compiling() and isinstance(tensor, FakeTensor)


@functools.cache
def _triton_decode() -> Any:
    """The fused kernel, None if triton is not installed."""
    try:
        from loftq_cli.kernels.triton_dequantize import decode
    except ImportError:
        return None
    return decode


def _empty(length: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(length, dtype=dtype, device="meta")
