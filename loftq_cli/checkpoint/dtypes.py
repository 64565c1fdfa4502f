"""The one table of dtypes: tags of the safetensors format, names in torch and settings, sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Tag: (name of torch's dtype, None if torch has none, bits of an element).
_TABLE: dict[str, tuple[str | None, int]] = {
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F4": (None, 4),
    "F6_E2M3": (None, 6),
    "F6_E3M2": (None, 6),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}

BITS = {tag: bits for tag, (_, bits) in _TABLE.items()}
"""Bits of an element, by tag."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""Tags of the dtypes whose values can be computed with."""

_TAGS = {name: tag for tag, (name, _) in _TABLE.items() if name is not None}


def name_of(tag: str) -> str:
    """The name that torch, settings and configs have for ``tag``: "float32" for F32. Raises
    KeyError if torch has no such dtype."""
    name, _ = _TABLE[tag]
    if name is None:
        raise KeyError(tag)
    return name


def tag_named(name: str) -> str:
    """The tag of a name: inverse of :func:`name_of`."""
    return _TAGS[name]


def torch_dtype(tag: str) -> torch.dtype:
    """torch's dtype for ``tag``. Raises KeyError if there is none."""
    import torch

    found: torch.dtype = getattr(torch, name_of(tag))
    return found


def tag_of(dtype: torch.dtype) -> str:
    """The tag of torch's ``dtype``."""
    return _TAGS[str(dtype).removeprefix("torch.")]


def computed(tag: str) -> str:
    """The tag of what is computed from a tensor of dtype ``tag`` and stored in "its" dtype: F32 for
    F64, as the arithmetic is float32 and float64 would be twice the bytes for the same values."""
    return "F32" if tag == "F64" else tag


def resolve(setting: str, tag: str) -> str:
    """The tag for a setting: a name, or "source" for the dtype of a matrix of dtype ``tag``."""
    return computed(tag) if setting == "source" else tag_named(setting)
