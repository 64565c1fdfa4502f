"""The safetensors header: parsed and checked here, before a byte of any tensor is believed.

Format (https://github.com/huggingface/safetensors#format): eight bytes little-endian length, a
JSON object of that length that maps tensor names to dtype, shape and data_offsets, then the data.
The library accepts duplicate keys and does not tell what is wrong; here every fault is named.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.dtypes import BITS
from loftq_cli.checkpoint.lfs import refuse_pointer

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

_MAX_SIZE = 1 << 62  # no real size is this large, and larger ones would make huge products
_LONGEST_SHOWN = 200


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of one tensor, without its place: ``dtype`` is the format's tag."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * BITS[self.dtype] // 8


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """A tensor in a file: ``start`` is the absolute offset of its first byte."""

    start: int


@dataclass(frozen=True)
class Header:
    """A checked header: ``tensors`` in the order of their bytes, ``size`` of the whole file,
    ``sha256`` of the length field and the JSON, ``data_start`` the offset of the first byte,
    ``metadata`` the texts under ``__metadata__``."""

    tensors: tuple[StoredTensor, ...]
    size: int
    data_start: int
    sha256: str
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)


class HeaderError(ValueError):
    """The header is not well-formed; the message says how, without the file's name."""


def read_header(path: Path) -> Header:
    """Parse and check the header of ``path``. Raises HeaderError, CorruptFileError for a pointer of
    git-lfs, or OSError from the file."""
    refuse_pointer(path)
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its other end
        raise HeaderError("not a regular file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        return parse_header(prefix, file.read(json_length(prefix, size)), size)


def json_length(prefix: bytes, size: int) -> int:
    """How much JSON follows the first eight bytes of a file of ``size`` bytes. Raises HeaderError
    if that cannot be."""
    if len(prefix) < 8:
        raise HeaderError(f"{size} bytes are too few for a safetensors file")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise HeaderError("not a safetensors file, or its header exceeds 100 MB")
    if 8 + length > size:
        raise HeaderError(f"the header claims {length} bytes, the file ends after {size - 8}")
    return length


def parse_header(prefix: bytes, raw: bytes, size: int) -> Header:
    """Check the header of a file of ``size`` bytes: its first eight bytes and the JSON behind
    them. Raises HeaderError."""
    length = json_length(prefix, size)
    if len(raw) < length:
        raise HeaderError("the file was shortened while it was read")
    tensors, metadata = _parse(raw, data_start=8 + length)
    _check_extents(tensors, 8 + length, size)
    digest = hashlib.sha256(prefix + raw).hexdigest()
    return Header(tuple(tensors), size, 8 + length, digest, metadata)


def strict_json(raw: bytes) -> Any:
    """JSON from untrusted bytes. Raises ValueError on bad UTF-8, duplicate keys, or nesting that
    exhausts the parser."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            raise ValueError(f"the key {shown(counts.most_common(1)[0][0])} occurs twice")
        return result

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def shown(value: object) -> str:
    """The repr of a value from a file, cut where it would drown the message it is for."""
    text = repr(value)
    if len(text) <= _LONGEST_SHOWN:
        return text
    return f"{text[:_LONGEST_SHOWN]}... ({len(text)} characters)"


def is_text(value: object) -> bool:
    """Whether ``value`` is a string without lone surrogates, which JSON allows and UTF-8 not."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse(raw: bytes, data_start: int) -> tuple[list[StoredTensor], dict[str, str]]:
    try:
        entries = strict_json(raw)
    except ValueError as error:
        raise HeaderError(f"the header is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise HeaderError("the header is not a JSON object")
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not _is_text_map(metadata):
        raise HeaderError("__metadata__ is not a map from text to text")
    tensors = [_parse_entry(name, entry, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    return tensors, metadata or {}


def _parse_entry(name: str, entry: object, data_start: int) -> StoredTensor:
    where = f"tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{where}: expected dtype, shape and data_offsets")
    if not is_text(name):
        raise HeaderError(f"{where}: the name is not valid Unicode")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise HeaderError(f"{where}: unknown dtype {shown(dtype)}")
    if not _is_sizes(shape):
        raise HeaderError(f"{where}: the shape {shown(shape)} is not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"{where}: bad data_offsets {shown(offsets)}")
    elements = 1
    for side in shape:
        elements *= side
        if elements > _MAX_SIZE:
            raise HeaderError(f"{where}: the shape {shown(shape)} is too large")
    bits = elements * BITS[dtype]
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise HeaderError(
            f"{where}: shape {shown(shape)} of {dtype} takes {bits / 8:.15g} bytes, "
            f"the header gives it {offsets[1] - offsets[0]}"
        )
    return StoredTensor(name, dtype, tuple(shape), data_start + offsets[0])


def _is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(is_text(t) for item in value.items() for t in item)


def _is_sizes(value: object) -> bool:
    # bool is an int to Python
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < _MAX_SIZE for item in value
    )


def _check_extents(tensors: Iterable[StoredTensor], data_start: int, size: int) -> None:
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            what = "overlaps the one before it" if tensor.start < position else "leaves a hole"
            raise HeaderError(f"tensor {shown(tensor.name)} {what} at byte {position}")
        position += tensor.nbytes
    if position != size:
        what = "is cut short" if size < position else "has bytes after its last tensor"
        raise HeaderError(f"the file {what}: {size} bytes, {position} expected")
