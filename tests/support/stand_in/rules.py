"""What a CUDA device makes of an operation: whether a kernel starts, and whether the host waits."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

_ELEMENTWISE = """
add iadd radd sub isub rsub mul imul rmul div idiv truediv rtruediv itruediv pow rpow true_divide
floor_divide floordiv fmod remainder where maximum minimum eq ne lt le gt ge and iand rand or ior
ror xor logical_and logical_or logical_not clamp clamp_min clamp_max lerp addcmul addcdiv
masked_fill isclose
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
"""Operations in which a number in a tensor of the CPU may meet tensors of the device."""

_NONE = """
empty empty_like empty_strided new_empty new_empty_strided detach alias lift_fresh set_ resize_
squeeze_ unsqueeze_ t_ transpose_ _local_scalar_dense is_same_size sym_size result_type
"""
_NO_KERNEL = frozenset(_NONE.split())
_LOOKS = """
_local_scalar_dense nonzero masked_select _unique2 unique_dim unique_consecutive equal is_nonzero
bincount _linalg_eigh _linalg_svd linalg_eig linalg_lstsq linalg_qr _linalg_slogdet
"""
_WAITING = frozenset(_LOOKS.split())
"""Those whose result has a size that only the device knows, and those that look at it before they
go on (linalg's, to find out whether they failed; qr's is safe to count among them)."""


@functools.cache
def launches(func: Any) -> bool:
    """Whether an operation of the dispatcher starts a kernel: no view, no allocation."""
    name = func.overloadpacket.__name__
    if name in _NO_KERNEL:
        return False
    arguments, returns = func._schema.arguments, func._schema.returns
    views = any(each.alias_info is not None and not each.alias_info.is_write for each in arguments)
    return not (views and any(each.alias_info is not None for each in returns))


def waits(name: str, args: Sequence[Any]) -> bool:
    """Whether the host waits for an operation of the dispatcher."""
    if name in ("index", "index_put", "index_put_") and len(args) > 1:
        return any(each is not None and each.dtype == torch.bool for each in args[1])
    return name in _WAITING


def tensors(*values: Any) -> Iterator[torch.Tensor]:
    """Those in arguments, however deep."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from tensors(*value.values())
        elif isinstance(value, (tuple, list)):
            yield from tensors(*value)


def number(device: Any, current: int) -> int | None:
    """The number of a CUDA device, None of another."""
    if isinstance(device, int):
        return device
    device = torch.device(device)
    if device.type != "cuda":
        return None
    return current if device.index is None else int(device.index)


def is_copy(args: Sequence[Any]) -> bool:
    """Whether ``tensor[index] = value`` copies: no tensor among the indices, or one number."""
    index, value = args[1], args[2]
    return not any(True for _ in tensors(index)) or value.dim() == 0


def parsed_to(
    args: Sequence[Any], kwargs: Mapping[str, Any], current: int
) -> tuple[Any, torch.dtype | None, bool, bool]:
    """(device, dtype, non_blocking, copy) of a call of ``Tensor.to``."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    flags: list[bool] = []
    for each in args:
        if isinstance(each, torch.dtype):
            dtype = each
        elif isinstance(each, bool):
            flags.append(each)
        elif isinstance(each, torch.Tensor):
            device, dtype = each.device, each.dtype
        elif each is not None:
            device = each
    flags += [False, False]
    other = kwargs.get("other")
    if other is not None:
        device, dtype = other.device, other.dtype
    non_blocking = kwargs.get("non_blocking", flags[0])
    return device, dtype, bool(non_blocking), bool(kwargs.get("copy", flags[1]))
