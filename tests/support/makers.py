"""Safetensors files made by hand, byte for byte, and small ways to damage a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import settings

PROPERTY = settings(max_examples=60)

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
"""What a clone without git-lfs has in the place of a large file."""


def container(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file; ``header`` as bytes is taken as it is, ``length`` belies its length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: str, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    """One tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def flip_bit(path: Path, position: int = -1) -> None:
    """Invert the lowest bit of the byte at ``position``, by default the last one."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def shorten(path: Path, count: int = 1) -> None:
    """Cut ``count`` bytes off the end."""
    path.write_bytes(path.read_bytes()[:-count])
