"""The header parser: every fault has its own message, and what it accepts the library accepts."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from loftq_cli.checkpoint.dtypes import BITS
from loftq_cli.checkpoint.header import MAX_HEADER_BYTES, HeaderError, read_header, strict_json
from tests.support.makers import PROPERTY, container, entry

ONE = {"a": entry("F32", [2], 0, 8)}
BYTES = bytes(range(8))
SMALL = container(
    {
        "__metadata__": {"format": "pt"},
        "b.weight": entry("I32", [2, 1], 0, 8),
        "a.weight": entry("BF16", [3], 8, 14),
        "empty": entry("F16", [0, 4], 14, 14),
        "scalar": entry("U8", [], 14, 15),
    },
    bytes(range(15)),
)


def error_of(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(HeaderError) as caught:
        read_header(path)
    return str(caught.value)


def one(**changed: object) -> dict[str, object]:
    """A header of one float32 tensor of two elements, with fields changed."""
    return {"a": {**entry("F32", [2], 0, 8), **changed}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few"),
        (b"\x02\0\0\0\0\0\0", "7 bytes are too few"),
        (container({}, length=3), "the header claims 3 bytes, the file ends after 2"),
        (container(b"", length=2**63), "header exceeds 100 MB"),
        (container(b"{}", length=MAX_HEADER_BYTES + 1), "header exceeds 100 MB"),
        (b"PK\x03\x04" + bytes(100), "the header claims"),
        (container(b""), "not valid JSON: Expecting value"),
        (container(b"{"), "not valid JSON"),
        (container(b"{} {}"), "not valid JSON: Extra data"),
        (container(b"{}\0"), "not valid JSON: Extra data"),
        (container(b'{"a": \xff}'), "not valid JSON: 'utf-8' codec can't decode"),
        (container(b"\xef\xbb\xbf{}"), "not valid JSON: Unexpected UTF-8 BOM"),
        (container(b'{"a": 1, "a": 2}'), "the key 'a' occurs twice"),
        (container(b'{"a": {"dtype": "U8", "dtype": "F32"}}'), "the key 'dtype' occurs twice"),
        (container(b"[" * 200_000), "nested too deeply"),
        (container(b'{"a":' * 200_000), "nested too deeply"),
        (container(b"9" * 5000), "not valid JSON: Exceeds the limit"),
        (container([]), "not a JSON object"),
        (container("a"), "not a JSON object"),
        (container({"__metadata__": []}), "__metadata__ is not a map"),
        (container({"__metadata__": {"format": 1}}), "__metadata__ is not a map"),
        (container({"__metadata__": {"a": "\ud800"}}), "__metadata__ is not a map"),
        (container({"a": None}), "tensor 'a': expected dtype, shape and data_offsets"),
        (container({"a": {"dtype": "U8", "shape": [0]}}), "expected dtype, shape"),
        (container(one(extra=1), BYTES), "expected dtype, shape"),
        (container({"\ud800": entry("F32", [2], 0, 8)}, BYTES), "name is not valid Unicode"),
        (container(one(dtype="F31"), BYTES), "unknown dtype 'F31'"),
        (container(one(dtype="f32"), BYTES), "unknown dtype 'f32'"),
        (container(one(dtype=["F32"]), BYTES), "unknown dtype ['F32']"),
        (container(one(shape=2), BYTES), "the shape 2 is not a list of sizes"),
        (container(one(shape=[-2]), BYTES), "the shape [-2] is not a list"),
        (container(one(shape=[-1, -2]), BYTES), "the shape [-1, -2] is not a list"),
        (container(one(shape=[2.0]), BYTES), "the shape [2.0] is not a list"),
        (container(one(shape=[True, 2]), BYTES), "the shape [True, 2] is not a list"),
        (container(one(shape=["2"]), BYTES), "the shape ['2'] is not a list"),
        (container(one(shape=[[2]]), BYTES), "the shape [[2]] is not a list"),
        (container(one(shape=[float("nan")]), BYTES), "the shape [nan] is not a list"),
        (container(one(shape=[2**62]), BYTES), "the shape [4611686018427387904] is not a list"),
        (container(one(shape=[2**61] * 20), BYTES), "(420 characters) is too large"),
        (container(one(shape=[2**61] * 20 + [0]), BYTES), "is too large"),
        (container(one(shape=[2**61 - 1] * 100_000), BYTES), "is too large"),
        (container(one(shape=[3]), BYTES), "takes 12 bytes, the header gives it 8"),
        (container(one(shape=[0]), BYTES), "takes 0 bytes, the header gives it 8"),
        (container(one(shape=[2, 2**61]), BYTES), "takes 1.84467440737096e+19 bytes"),
        (container(one(dtype="F4", shape=[15]), BYTES), "takes 7.5 bytes, the header gives it 8"),
        (container(one(data_offsets=[0]), BYTES), "bad data_offsets [0]"),
        (container(one(data_offsets=[0, 4, 8]), BYTES), "bad data_offsets [0, 4, 8]"),
        (container(one(data_offsets=[8, 0]), BYTES), "bad data_offsets [8, 0]"),
        (container(one(data_offsets=[-8, 0]), BYTES), "bad data_offsets [-8, 0]"),
        (container(one(data_offsets=[0, 8.0]), BYTES), "bad data_offsets [0, 8.0]"),
        (container(one(data_offsets="08"), BYTES), "bad data_offsets '08'"),
        (
            container({**ONE, "b": entry("F32", [1], 4, 8)}, BYTES),
            "tensor 'b' overlaps the one before it",
        ),
        (container({**ONE, "b": entry("U8", [0], 4, 4)}, BYTES), "tensor 'b' overlaps"),
        (container({**ONE, "b": entry("U8", [1], 9, 10)}, bytes(10)), "tensor 'b' leaves a hole"),
        (container(one(data_offsets=[1, 9]), bytes(9)), "tensor 'a' leaves a hole"),
        (container(ONE, BYTES + b"!"), "has bytes after its last tensor"),
        (container({}, b"!"), "has bytes after its last tensor"),
        (container(ONE, BYTES[:-1]), "is cut short"),
    ],
)
def test_every_fault_has_its_own_message(tmp_path, content, message):
    assert message in error_of(tmp_path / "f", content)


@pytest.mark.parametrize("what", ["name", "dtype", "shape"])
def test_a_message_stays_one_short_line_whatever_the_file_holds(tmp_path, what):
    long = {
        "name": {"n" * 100_000: entry("F32", [3], 0, 8)},
        "dtype": one(dtype="\n" * 100_000),
        "shape": one(shape=[[]] * 100_000),
    }
    message = error_of(tmp_path / "f", container(long[what], BYTES))
    assert len(message) < 1000
    assert "\n" not in message


@pytest.mark.parametrize("depth", range(100, 1100, 100))
@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_nesting_that_the_parser_just_survives_does_not_overflow_later(tmp_path, field, depth):
    nested = json.dumps(one(**{field: "?"})).replace('"?"', "[" * depth + "]" * depth)
    assert error_of(tmp_path / "f", container(nested.encode(), BYTES))


def test_a_file_cut_at_any_byte_is_rejected(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(SMALL)
    assert len(read_header(path).tensors) == 4
    for length in range(len(SMALL)):
        assert error_of(path, SMALL[:length])


def test_directories_and_pipes_are_not_opened(tmp_path):
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("directory", "pipe"):
        with pytest.raises(HeaderError, match="not a regular file"):
            read_header(tmp_path / name)


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(SMALL)
    header = read_header(path)
    (length,) = struct.unpack("<Q", SMALL[:8])
    assert header.data_start == 8 + length
    assert header.size == len(SMALL)
    assert header.sha256 == hashlib.sha256(SMALL[: 8 + length]).hexdigest()
    assert [(t.name, t.dtype, t.shape, t.start - header.data_start) for t in header.tensors] == [
        ("b.weight", "I32", (2, 1), 0),
        ("a.weight", "BF16", (3,), 8),
        ("empty", "F16", (0, 4), 14),
        ("scalar", "U8", (), 14),
    ]
    assert [(t.elements, t.nbytes) for t in header.tensors] == [(2, 8), (3, 6), (0, 0), (1, 1)]


@pytest.mark.parametrize("header", [b"{}", b" {}\n ", b'{"__metadata__": null}', b'{"": %s}'])
def test_unusual_files_that_the_library_reads_are_read(tmp_path, header):
    content = container(header.replace(b"%s", json.dumps(entry("U8", [0], 0, 0)).encode()))
    path = tmp_path / "f"
    path.write_bytes(content)
    assert {tensor.name for tensor in read_header(path).tensors} == {
        name for name, _ in safetensors.deserialize(content)
    }


@pytest.mark.parametrize("tag", BITS)
def test_agrees_with_the_library_on_every_dtype(tmp_path, tag):
    nbytes = BITS[tag]  # of 2 x 4 elements
    header = {
        "matrix": entry(tag, [2, 4], 0, nbytes),
        "none": entry(tag, [3, 0], nbytes, nbytes),
    }
    content = container(header, bytes(range(nbytes)))
    path = tmp_path / "f"
    path.write_bytes(content)
    ours = {
        t.name: (t.dtype, list(t.shape), content[t.start : t.start + t.nbytes])
        for t in read_header(path).tensors
    }
    assert ours == library_view(content)


def library_view(content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    return {
        name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"]))
        for name, tensor in safetensors.deserialize(content)
    }


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(), max_size=4)
    | st.sampled_from(["F32", "U8", "F4", "dtype", "shape", "data_offsets"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
sizes = st.integers(0, 4) | st.sampled_from([2**31, 2**61, 2**62, 2**64])
plausible_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "X"]),
        "shape": st.lists(sizes, max_size=3),
        "data_offsets": st.lists(sizes, min_size=2, max_size=2),
    }
)
headers = st.dictionaries(
    st.text(max_size=4) | st.sampled_from(["__metadata__", "a", "b"]),
    plausible_entries | json_values,
    max_size=3,
)


@PROPERTY
@given(headers | json_values, st.binary(max_size=16))
def test_of_random_headers_only_header_errors_escape(tmp_path_factory, header, data):
    check(tmp_path_factory, container(header, data))


@PROPERTY
@given(st.binary(max_size=40), st.integers(0, 60) | st.integers(0, 2**64 - 1))
def test_of_random_bytes_only_header_errors_escape(tmp_path_factory, raw, length):
    check(tmp_path_factory, container(raw, length=length))


@PROPERTY
@given(st.data())
def test_of_mutated_files_only_header_errors_escape(tmp_path_factory, data):
    content = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    check(tmp_path_factory, bytes(content))


def check(tmp_path_factory, content: bytes) -> None:
    """Rejected with HeaderError, or accepted and then by the library too, with the same view."""
    path = tmp_path_factory.getbasetemp() / "random"
    path.write_bytes(content)
    try:
        tensors = read_header(path).tensors
    except HeaderError:
        return
    ours = {
        t.name: (t.dtype, list(t.shape), content[t.start : t.start + t.nbytes]) for t in tensors
    }
    assert ours == library_view(content)


@PROPERTY
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(BITS)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=5,
    )
)
def test_well_formed_files_are_accepted(tmp_path_factory, tensors):
    header, position = {}, 0
    for number, (tag, shape) in enumerate(tensors):
        shape = [*shape, 8]  # whole bytes at every width
        count = 8
        for side in shape[:-1]:
            count *= side
        nbytes = count * BITS[tag] // 8
        header[f"t{number}"] = entry(tag, shape, position, position + nbytes)
        position += nbytes
    path = tmp_path_factory.getbasetemp() / "good"
    path.write_bytes(container(header, bytes(position)))
    assert [(t.name, t.dtype, list(t.shape)) for t in read_header(path).tensors] == [
        (name, item["dtype"], item["shape"])
        for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"])
    ]


@pytest.mark.parametrize("raw", [b"\xff", b"[1,]", b"", b'{"a": 1, "a": 1}'])
def test_strict_json_raises_value_errors(raw):
    with pytest.raises(ValueError):
        strict_json(raw)
