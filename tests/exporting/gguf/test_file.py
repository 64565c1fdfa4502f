"""GGUF headers: as gguf's own reader reads them, and what is wrong with them."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loftq_cli.errors import CorruptFileError, SourceNotFoundError
from loftq_cli.exporting.gguf.file import Field, header_of, read_gguf
from tests.support import gguf_files

FIELDS = {"general.name": "x", "tokenizer.ggml.tokens": ["a", "", "ü"], "n": 7}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {
        "a.weight": torch.arange(64.0).view(2, 32),
        "b": torch.ones(5),
        "c.weight": torch.ones(2, 3, 32, dtype=torch.float16),
        "d.weight": torch.ones(4, 32, dtype=torch.bfloat16),
    }
    return gguf_files.write(tmp_path / "model.gguf", tensors, FIELDS)


def test_it_reads_what_ggufs_reader_reads(file: Path) -> None:
    found, theirs = read_gguf(file), gguf.GGUFReader(file)
    assert found.architecture == "llama"
    assert [t.name for t in found.tensors] == [t.name for t in theirs.tensors]
    for own, other in zip(found.tensors, theirs.tensors, strict=True):
        assert own.shape == tuple(int(side) for side in other.shape)[::-1]
        assert (own.kind.id, own.nbytes) == (int(other.tensor_type), other.n_bytes)
        assert own.start == other.data_offset


def test_what_is_written_again_is_read_alike_by_ggufs_reader(file: Path) -> None:
    found = read_gguf(file)
    written = header_of(found.fields, found.tensors)
    raw = bytearray(written.nbytes)
    raw[: len(written.raw)] = written.raw
    old = file.read_bytes()
    for before, after in zip(found.tensors, written.tensors, strict=True):
        raw[after.start : after.start + after.nbytes] = old[before.start :][: before.nbytes]
    copy = file.with_name("copy.gguf")
    copy.write_bytes(raw)
    ours, theirs = gguf.GGUFReader(copy), gguf.GGUFReader(file)
    assert ours.fields.keys() == theirs.fields.keys()
    for one, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (one.data == other.data).all()


def header(*, version: int = 3, tensors: int = 0, fields: bytes = b"", count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + fields


def entry(name: str, sides: list[int], kind: int, offset: int) -> bytes:
    raw = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(sides))
    return raw + struct.pack(f"<{len(sides)}QIQ", *sides, kind, offset)


TWICE = gguf_files.field("n", 4, struct.pack("<I", 7)) * 2
ODD = gguf_files.field("general.alignment", 4, struct.pack("<I", 3))


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"GGML....", "not a GGUF file"),
        (header(version=1), "version 1"),
        (header(tensors=1 << 40), "claims 1099511627776 tensors"),
        (header(count=1), "ends inside the header"),
        (header(count=2, fields=TWICE), "'n' occurs twice"),
        (header(count=1, fields=gguf_files.field("n", 99, b"")), "a field of type 99"),
        (header(count=1, fields=ODD), "general.alignment is 3"),
        (header(tensors=1) + entry("w", [32], 77, 0), "of type 77, which is not known"),
        (header(tensors=1) + entry("w", [33], 2, 0), "[33], which is not for Q4_0"),
        (header(tensors=1) + entry("w", [32], 0, 0), "it was cut, or its header is wrong"),
        (header(tensors=1) + entry("w", [1 << 40, 1 << 40], 0, 0), "which is not for F32"),
        (header(tensors=1) + entry("w", [1] * 5, 0, 0), "has 5 dimensions"),
    ],
)
def test_what_is_wrong_is_said(raw: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(CorruptFileError) as caught:
        read_gguf(path)
    assert said in caught.value.message
    assert str(path) in caught.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match=r"none\.gguf: no such file"):
        read_gguf(tmp_path / "none.gguf")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(data=st.data())
def test_a_damaged_header_is_read_or_refused_and_nothing_else(file: Path, data) -> None:
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, min(len(raw) - 1, 400)))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    path = file.with_name("damaged.gguf")
    path.write_bytes(raw[:cut] if data.draw(st.booleans()) else raw)
    with suppress(CorruptFileError):
        found = read_gguf(path)
        assert all(t.start + t.nbytes <= path.stat().st_size for t in found.tensors)


def test_fields_are_what_they_say() -> None:
    assert Field.number(4, 7).raw == b"\7\0\0\0"
    assert Field.text("ü").as_text() == "ü"
    assert Field.number(6, 0.0).as_text() is None
