"""The table of floating-point dtypes: their tags in a file, their names, what is computed in."""

from __future__ import annotations

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Tags of the dtypes whose values can be computed with, to their names in settings and configs."""

TAGS = {name: tag for tag, name in FLOATS.items()}
"""The inverse of ``FLOATS``."""


def computed(tag: str) -> str:
    """The tag of what is computed from a tensor of dtype ``tag`` and stored in "its" dtype: F32 for
    F64, as the arithmetic is float32 and float64 would be twice the bytes for the same values."""
    return "F32" if tag == "F64" else tag


def resolve(setting: str, tag: str) -> str:
    """The tag for a setting: a name of ``FLOATS``, or "source" for the dtype of a matrix of dtype
    ``tag``."""
    return computed(tag) if setting == "source" else TAGS[setting]
