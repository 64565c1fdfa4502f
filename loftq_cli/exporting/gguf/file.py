"""GGUF files: the header read and checked, and files written with other tensors.

Format (ggml/docs/gguf.md, versions 2 and 3, little-endian): "GGUF", version uint32, the numbers of
tensors and of fields uint64; the fields, each a name, a type and a value; of each tensor its name,
dimensions (the one that varies fastest first), type and offset from where the data begin, which is
aligned, as each tensor is.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.checkpoint.header import shown
from loftq_cli.errors import CorruptFileError, EnvironmentFailure, SourceNotFoundError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_MOST_HEADER = 256 << 20  # bytes: vocabularies are in it
_MOST_TENSORS = 1 << 20
_MOST_FIELDS = 1 << 16
_STRING, _ARRAY = 8, 9
# Field type: (struct format, bytes); strings and arrays apart.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
UINT32, FLOAT32 = 4, 6

_HINT = "make it again, with convert_hf_to_gguf.py of llama.cpp"


@dataclass(frozen=True)
class Kind:
    """A type of tensors: ``id`` and ``name`` in ggml, elements of a block and its bytes."""

    id: int
    name: str
    elements: int
    nbytes: int


# ggml.h, ggml-common.h; others are known by name so that they can be refused by it.
KINDS = {
    kind.id: kind
    for kind in (
        Kind(0, "F32", 1, 4),
        Kind(1, "F16", 1, 2),
        Kind(2, "Q4_0", 32, 18),
        Kind(3, "Q4_1", 32, 20),
        Kind(6, "Q5_0", 32, 22),
        Kind(7, "Q5_1", 32, 24),
        Kind(8, "Q8_0", 32, 34),
        Kind(9, "Q8_1", 32, 36),
        Kind(10, "Q2_K", 256, 84),
        Kind(11, "Q3_K", 256, 110),
        Kind(12, "Q4_K", 256, 144),
        Kind(13, "Q5_K", 256, 176),
        Kind(14, "Q6_K", 256, 210),
        Kind(15, "Q8_K", 256, 292),
        Kind(20, "IQ4_NL", 32, 18),
        Kind(24, "I8", 1, 1),
        Kind(25, "I16", 1, 2),
        Kind(26, "I32", 1, 4),
        Kind(27, "I64", 1, 8),
        Kind(28, "F64", 1, 8),
        Kind(30, "BF16", 1, 2),
        Kind(39, "MXFP4", 32, 17),
        Kind(42, "Q2_0", 64, 18),
    )
}
F32, F16, BF16 = (KINDS[number] for number in (0, 1, 30))


@dataclass(frozen=True)
class GgufTensor:
    """``shape`` with the dimension that varies fastest last, as torch has it; ``start``: the offset
    of its first byte in the file."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.elements * self.kind.nbytes


@dataclass(frozen=True)
class Field:
    """A field of the header: ``type`` and the ``raw`` bytes of its value."""

    type: int
    raw: bytes

    @staticmethod
    def number(type: int, value: float) -> Field:
        """A scalar of that type."""
        return Field(type, struct.pack(f"<{_SCALARS[type]}", value))

    @staticmethod
    def text(value: str) -> Field:
        """A string."""
        raw = value.encode()
        return Field(_STRING, struct.pack("<Q", len(raw)) + raw)

    def as_text(self) -> str | None:
        """The string, None if it is none."""
        return self.raw[8:].decode("utf-8", "replace") if self.type == _STRING else None


@dataclass(frozen=True)
class GgufFile:
    """The header of ``path``: ``fields`` by name and ``tensors``, both in their order."""

    path: Path
    fields: Mapping[str, Field]
    tensors: Sequence[GgufTensor]

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the model's."""
        field = self.fields.get("general.architecture")
        return (field and field.as_text()) or ""


def read_gguf(path: Path) -> GgufFile:
    """The header of ``path``. Raises SourceNotFoundError, EnvironmentFailure if it cannot be read,
    CorruptFileError with what is wrong."""
    if not path.is_file():
        raise SourceNotFoundError(f"{path}: no such file", hint=_HINT)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            raw = file.read(min(size, _MOST_HEADER))
    except OSError as error:
        raise EnvironmentFailure(f"{path}: {error.strerror or error}") from error
    try:
        return _parsed(path, raw, size)
    except _Malformed as error:
        raise CorruptFileError(f"{path}: {error}", hint=_HINT) from error


class _Malformed(ValueError):
    """What is wrong, without the file's name."""


class _Cursor:
    """Reads values from the start of a file on."""

    def __init__(self, raw: bytes, size: int) -> None:
        self._raw, self._size, self.position = raw, size, 0

    def take(self, length: int) -> bytes:
        end = self.position + length
        if end > len(self._raw):
            short = end > self._size
            raise _Malformed(
                f"it ends inside the header, at byte {self._size}"
                if short
                else f"the header is larger than {_MOST_HEADER >> 20} MiB"
            )
        piece = self._raw[self.position : end]
        self.position = end
        return piece

    def number(self, form: str) -> int:
        (value,) = struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))
        return int(value)

    def text(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise _Malformed(f"the name {shown(raw)} is not UTF-8") from None

    def value(self, type: int, depth: int = 0) -> None:
        """Pass over a value."""
        if type in _SCALARS:
            self.take(struct.calcsize(f"<{_SCALARS[type]}"))
        elif type == _STRING:
            self.take(self.number("Q"))
        elif type == _ARRAY and depth < 4:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SCALARS:
                self.take(count * struct.calcsize(f"<{_SCALARS[inner]}"))
            else:
                if count > len(self._raw):
                    raise _Malformed(f"an array of {count} values")
                for _ in range(count):
                    self.value(inner, depth + 1)
        else:
            raise _Malformed(f"a field of type {type}, which no version has")


def _parsed(path: Path, raw: bytes, size: int) -> GgufFile:
    if raw[:4] != MAGIC:
        raise _Malformed("not a GGUF file")
    cursor = _Cursor(raw, size)
    cursor.take(4)
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise _Malformed(f"GGUF of version {version}; versions 2 and 3 are read")
    tensors, fields = cursor.number("Q"), cursor.number("Q")
    if tensors > _MOST_TENSORS or fields > _MOST_FIELDS:
        raise _Malformed(f"the header claims {tensors} tensors and {fields} fields")
    found: dict[str, Field] = {}
    for _ in range(fields):
        name, type = cursor.text(), cursor.number("I")
        start = cursor.position
        cursor.value(type)
        if name in found:
            raise _Malformed(f"the field {shown(name)} occurs twice")
        found[name] = Field(type, raw[start : cursor.position])
    entries = [_entry(cursor) for _ in range(tensors)]
    alignment = _alignment(found)
    begin = -(-cursor.position // alignment) * alignment
    placed, names = [], set[str]()
    for name, kind, shape, offset in entries:
        tensor = GgufTensor(name, kind, shape, begin + offset)
        if name in names:
            raise _Malformed(f"tensor {shown(name)} occurs twice")
        names.add(name)
        if offset % alignment or tensor.start + tensor.nbytes > size:
            raise _Malformed(
                f"tensor {shown(name)} ends at byte {tensor.start + tensor.nbytes}, the file at "
                f"{size}: it was cut, or its header is wrong"
            )
        placed.append(tensor)
    return GgufFile(path, found, tuple(placed))


def _entry(cursor: _Cursor) -> tuple[str, Kind, tuple[int, ...], int]:
    name = cursor.text()
    count = cursor.number("I")
    if not 1 <= count <= 4:
        raise _Malformed(f"tensor {shown(name)} has {count} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(count))[::-1]
    type, offset = cursor.number("I"), cursor.number("Q")
    kind = KINDS.get(type)
    if kind is None:
        raise _Malformed(f"tensor {shown(name)} is of type {type}, which is not known here")
    if math.prod(shape) >= 1 << 60 or shape[-1] % kind.elements:
        raise _Malformed(f"tensor {shown(name)} is {list(shape)}, which is not for {kind.name}")
    return name, kind, shape, offset


def _alignment(fields: Mapping[str, Field]) -> int:
    field = fields.get(_ALIGNMENT)
    if field is None:
        return 32
    value = int.from_bytes(field.raw, "little")
    if field.type != UINT32 or not 8 <= value <= 1 << 16 or value & (value - 1):
        raise _Malformed(f"{_ALIGNMENT} is {value}")
    return value


@dataclass(frozen=True)
class Written:
    """The header of a file that is to be written, and the tensors with their places."""

    raw: bytes
    tensors: Sequence[GgufTensor]

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        ends = [tensor.start + tensor.nbytes for tensor in self.tensors]
        return max([len(self.raw), *ends])


def header_of(fields: Mapping[str, Field], tensors: Sequence[GgufTensor]) -> Written:
    """The header of a file with these ``fields`` and ``tensors``, each at its place."""
    alignment = _alignment(fields)
    raw = MAGIC + struct.pack("<IQQ", 3, len(tensors), len(fields))
    raw += b"".join(
        _text(name) + struct.pack("<I", field.type) + field.raw for name, field in fields.items()
    )
    offsets = list(_offsets(tensors, alignment))
    for tensor, offset in zip(tensors, offsets, strict=True):
        sides = tensor.shape[::-1]
        raw += _text(tensor.name) + struct.pack(f"<I{len(sides)}Q", len(sides), *sides)
        raw += struct.pack("<IQ", tensor.kind.id, offset)
    raw += b"\0" * (-len(raw) % alignment)
    placed = [
        GgufTensor(tensor.name, tensor.kind, tensor.shape, len(raw) + offset)
        for tensor, offset in zip(tensors, offsets, strict=True)
    ]
    return Written(raw, placed)


def _offsets(tensors: Sequence[GgufTensor], alignment: int) -> Iterator[int]:
    position = 0
    for tensor in tensors:
        yield position
        position += tensor.nbytes + -tensor.nbytes % alignment


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw
