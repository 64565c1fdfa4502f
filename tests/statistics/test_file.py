"""Files of activation statistics: the format to the byte, and every way in which one can be bad."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from loftq_cli.errors import (
    CorruptFileError,
    MissingStatisticsError,
    OutputConflictError,
    SourceNotFoundError,
    StatisticsError,
    UnsupportedInputError,
)
from loftq_cli.statistics.file import open_statistics
from loftq_cli.statistics.statistics import MeasuredModel
from loftq_cli.statistics.triangle import pack, unpack
from loftq_cli.statistics.writer import StatisticsWriter
from tests.support.makers import container, entry, flip_bit, shorten

FULL = torch.tensor([[2.0, -1.0], [-1.0, 3.0]])
DIAGONAL = torch.tensor([1.0, 0.0, 4.0])
METADATA = {
    "format": "loftq-statistics",
    "format_version": "1",
    "matrices": '{"a.k.weight":"a.q","a.q.weight":"a.q","b.weight":"b"}',
    "tokens": '{"a.q":7,"b":5}',
}


def content(**changes: Any) -> bytes:
    """A good file, made by hand: a.q and a.k share a matrix of products, b has a diagonal."""
    metadata = {**METADATA, **changes.pop("metadata", {})}
    header = {
        "__metadata__": {key: value for key, value in metadata.items() if value is not None},
        "a.q.full": entry("F32", [2, 2], 0, 16),
        "b.diagonal": entry("F32", [3], 16, 28),
    }
    header.update(changes.pop("header", {}))
    data = struct.pack("<4f", *changes.pop("full", FULL.flatten().tolist()))
    data += struct.pack("<3f", *changes.pop("diagonal", DIAGONAL.tolist()))
    assert not changes
    return container({name: value for name, value in header.items() if value is not None}, data)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "stats.safetensors"
    path.write_bytes(content())
    return path


def test_a_file_made_by_hand_is_read(file):
    found = open_statistics(str(file))
    assert found.path == file
    assert found.matrices == {"a.k.weight": "a.q", "a.q.weight": "a.q", "b.weight": "b"}
    assert found.kind("a.k.weight") == "full"
    assert found.kind("b.weight") == "diagonal"
    assert (found.tokens("a.k.weight"), found.tokens("b.weight")) == (7, 5)
    assert found.model is None
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    for name in ("a.q.weight", "a.k.weight"):
        assert torch.equal(found.moments(name), FULL)
    assert torch.equal(found.moments("b.weight", in_features=3), DIAGONAL)
    found.require({"a.q.weight": 2, "b.weight": 3})


def test_the_model_is_told_where_the_file_says(file):
    model = json.dumps({"id": "owner/name", "sha256": "0" * 64})
    file.write_bytes(content(metadata={"model": model, "added later": "ignored"}))
    assert open_statistics(file).model == MeasuredModel("owner/name", "0" * 64)


def write(path: Path, **options: Any) -> None:
    with StatisticsWriter(path, ["a.q.weight", "a.k.weight", "b.weight"], **options) as writer:
        writer.add(["a.q.weight", "a.k.weight"], FULL, 7)
        writer.add(["b.weight"], DIAGONAL, 5)
        assert writer.publish() == path.stat().st_size


def test_what_is_written_is_what_the_format_says(tmp_path):
    path = tmp_path / "made" / "stats.safetensors"
    write(path, model=MeasuredModel("m", "0" * 64), text={"files": ["1" * 64], "samples": 2})
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert header == {
        "__metadata__": {
            **METADATA,
            "model": '{"id":"m","sha256":"' + "0" * 64 + '"}',
            "text": '{"files":["' + "1" * 64 + '"],"samples":2}',
        },
        "a.q.full": entry("F32", [2, 2], 0, 16),
        "b.diagonal": entry("F32", [3], 16, 28),
    }
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])
    assert raw[8 + length :] == struct.pack("<7f", 2, -1, -1, 3, 1, 0, 4)
    assert length % 8 == 0
    assert os.listdir(path.parent) == ["stats.safetensors"]


def test_the_safetensors_library_reads_it(tmp_path):
    path = tmp_path / "stats.safetensors"
    write(path)
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == METADATA
        assert torch.equal(opened.get_tensor("a.q.full"), FULL)
        assert torch.equal(opened.get_tensor("b.diagonal"), DIAGONAL)


def packed(width: int = 1030) -> torch.Tensor:
    rows = torch.randn(40, width, generator=torch.Generator().manual_seed(0))
    return rows.T @ rows / 40


def test_wide_moments_are_packed_between_others(tmp_path):
    path, wide = tmp_path / "stats.safetensors", packed()
    names = ["a.q.weight", "b.weight", "c.weight", "d.weight"]
    with StatisticsWriter(path, names) as writer:
        writer.add(["a.q.weight"], FULL, 7)
        writer.add(["b.weight"], wide, 40)
        writer.add(["c.weight"], DIAGONAL, 5)
        writer.add(["d.weight"], packed(1024), 40)
        assert writer.publish() == path.stat().st_size
    assert path.stat().st_size < 0.52 * 4 * (1030**2 + 1024**2)
    found = open_statistics(path)
    assert torch.equal(found.moments("a.q.weight"), FULL)
    assert torch.equal(found.moments("c.weight"), DIAGONAL)
    assert (found.kind("b.weight"), found.entry("b.weight").in_features) == ("full", 1030)
    assert torch.equal(found.moments("b.weight"), unpack(pack(wide)))
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata()["format_version"] == "2"
        assert opened.get_tensor("b.correlations").dtype == torch.int16
        torch.testing.assert_close(opened.get_tensor("d.directions"), pack(packed(1024)).directions)


def parts(tensors: dict[str, tuple[str, list[int]]], version: str = "2") -> bytes:
    """A file of zeros, whose only entry is b."""
    metadata = {**METADATA, "format_version": version, "matrices": '{"b.weight":"b"}'}
    header: dict[str, Any] = {"__metadata__": metadata}
    place = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * (2 if dtype.endswith("16") else 4)
        header[name] = entry(dtype, shape, place, place + size)
        place += size
    return container(header, bytes(place))


WHOLE: dict[str, tuple[str, list[int]]] = {
    "b.diagonal": ("F32", [3]),
    "b.directions": ("F32", [1, 3]),
    "b.correlations": ("I16", [4]),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b.diagonal": ("F32", [4])}, "do not fit each other"),
        ({"b.directions": ("F32", [2, 2])}, "do not fit each other"),
        ({"b.directions": ("F32", [3])}, "not F32 with 2 sides"),
        ({"b.correlations": ("I16", [3])}, "do not fit each other"),
        ({"b.correlations": ("I16", [2, 2])}, "not I16 with 1 sides"),
        ({"b.correlations": ("F16", [4])}, "is F16"),
        ({"b.full": ("F32", [3, 3])}, "'b' occurs twice"),
    ],
)
def test_the_parts_of_a_packed_entry_fit_each_other(tmp_path, changes, message):
    path = tmp_path / "stats.safetensors"
    path.write_bytes(parts(WHOLE))
    assert open_statistics(path).kind("b.weight") == "full"
    path.write_bytes(parts({**WHOLE, **changes}))
    with pytest.raises(StatisticsError, match=message):
        open_statistics(path)


def test_a_packed_entry_has_all_of_its_parts(tmp_path):
    path = tmp_path / "stats.safetensors"
    for missing, has in (("correlations", "diagonal and directions"), ("diagonal", "correlations")):
        left = {name: part for name, part in WHOLE.items() if name != f"b.{missing}"}
        path.write_bytes(parts(left))
        with pytest.raises(StatisticsError, match=f"'b' has {has}"):
            open_statistics(path)
    path.write_bytes(parts(WHOLE, version="1"))
    with pytest.raises(StatisticsError, match=r"neither \.diagonal nor \.full"):
        open_statistics(path)


def test_the_room_for_the_header_is_enough_for_unwieldy_names(tmp_path):
    names = [f'model."layers".\\{number}.ü.weight' for number in range(120)]
    path = tmp_path / "stats.safetensors"
    with StatisticsWriter(path, names) as writer:
        for name in names:
            writer.add([name], torch.ones(5), (1 << 40) + 1)
        writer.publish()
    found = open_statistics(path)
    assert list(found.matrices) == sorted(names)
    assert found.tokens(names[3]) == (1 << 40) + 1


def test_what_is_not_published_leaves_nothing(tmp_path):
    path = tmp_path / "stats.safetensors"
    with StatisticsWriter(path, ["b.weight"]) as writer:
        writer.add(["b.weight"], DIAGONAL, 5)
        assert os.listdir(tmp_path) == [".stats.safetensors.loftq-partial"]
    assert os.listdir(tmp_path) == []


def test_what_a_crash_left_is_not_in_the_way(tmp_path):
    (tmp_path / ".stats.safetensors.loftq-partial").write_bytes(b"x" * 1000)
    path = tmp_path / "stats.safetensors"
    write(path)
    clean = tmp_path / "clean.safetensors"
    write(clean)
    assert path.read_bytes() == clean.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["clean.safetensors", "stats.safetensors"]


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "stats.safetensors"
    with StatisticsWriter(path, ["b.weight"]) as first:
        with pytest.raises(OutputConflictError, match="another process"):
            StatisticsWriter(path, ["b.weight"])
        first.add(["b.weight"], DIAGONAL, 5)
        first.publish()
    assert open_statistics(path).tokens("b.weight") == 5


def test_an_earlier_file_is_replaced_only_on_demand(file):
    before = file.read_bytes()
    with pytest.raises(OutputConflictError, match="exists"):
        write(file)
    assert file.read_bytes() == before
    write(file, overwrite=True)
    assert file.read_bytes() != before


@pytest.mark.parametrize("make", [lambda path: path.write_bytes(b"notes"), Path.mkdir])
def test_something_else_is_never_replaced(tmp_path, make):
    path = tmp_path / "stats.safetensors"
    make(path)
    with pytest.raises(OutputConflictError, match="not a file of statistics"):
        write(path, overwrite=True)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"metadata": {"format": None}}, UnsupportedInputError, "none of activation statistics"),
        ({"metadata": {"format": "pt"}}, UnsupportedInputError, "none of activation statistics"),
        ({"metadata": {"format_version": "3"}}, UnsupportedInputError, "format version '3'"),
        ({"metadata": {"format_version": None}}, UnsupportedInputError, "format version None"),
        ({"metadata": {"tokens": None}}, StatisticsError, "'tokens' is missing"),
        ({"metadata": {"tokens": "{"}}, StatisticsError, "'tokens' is missing or malformed"),
        ({"metadata": {"tokens": '{"b":5}'}}, StatisticsError, "'a.q' has no count"),
        ({"metadata": {"tokens": '{"a.q":0,"b":5}'}}, StatisticsError, "'a.q' has no count"),
        ({"metadata": {"tokens": '{"a.q":true,"b":5}'}}, StatisticsError, "malformed"),
        ({"metadata": {"matrices": "[]"}}, StatisticsError, "'matrices' is missing or malformed"),
        ({"metadata": {"matrices": '{"b.weight":1}'}}, StatisticsError, "malformed"),
        ({"metadata": {"matrices": '{"b.weight":"c"}'}}, StatisticsError, "no entry 'c'"),
        ({"metadata": {"model": "{}"}}, StatisticsError, "'model' lacks"),
        (
            {"header": {"b.diagonal": None, "b.mean": entry("F32", [3], 16, 28)}},
            StatisticsError,
            "'b.mean' is neither",
        ),
        (
            {"header": {"b.diagonal": None, "b.full": entry("F32", [3], 16, 28)}},
            StatisticsError,
            r"'b.full' is F32 \(3,\), not F32 \(in, in\)",
        ),
        (
            {"header": {"a.q.full": entry("F32", [1, 4], 0, 16)}},
            StatisticsError,
            r"'a.q.full' is F32 \(1, 4\)",
        ),
        (
            {"header": {"a.q.full": None, "a.q.diagonal": entry("F32", [2, 2], 0, 16)}},
            StatisticsError,
            r"not F32 \(in,\)",
        ),
        (
            {"header": {"b.diagonal": entry("I32", [3], 16, 28)}},
            StatisticsError,
            "'b.diagonal' is I32",
        ),
        (
            {"header": {"b.diagonal": None, "a.q.diagonal": entry("F32", [3], 16, 28)}},
            StatisticsError,
            "'a.q' occurs twice",
        ),
    ],
)
def test_a_file_that_is_not_well_formed_is_refused_when_opened(file, changes, error, said):
    file.write_bytes(content(**changes))
    with pytest.raises(error, match=said) as raised:
        open_statistics(file)
    assert str(file) in raised.value.message


@pytest.mark.parametrize(
    ("changes", "name", "said"),
    [
        ({"diagonal": [1, -1e-9, 2]}, "b.weight", "'b' holds a negative square, -1e-09"),
        ({"diagonal": [1, float("nan"), 2]}, "b.weight", "'b' holds NaN or Inf"),
        ({"diagonal": [1, float("inf"), 2]}, "b.weight", "'b' holds NaN or Inf"),
        ({"diagonal": [0, 0, 0]}, "b.weight", "'b' is all zeros"),
        ({"full": [2, -1, -1, -3]}, "a.k.weight", "'a.q' holds a negative square"),
        ({"full": [2, -1, -1.1, 3]}, "a.k.weight", "'a.q' is not symmetric"),
        ({"full": [2, -1, float("-inf"), 3]}, "a.k.weight", "'a.q' holds NaN or Inf"),
        ({"full": [0, 0, 0, 0]}, "a.k.weight", "'a.q' is all zeros"),
        ({"full": [0, 1, 1, 0]}, "a.k.weight", "'a.q' holds no squares"),
    ],
)
def test_values_that_no_inputs_have_are_refused_when_read(file, changes, name, said):
    file.write_bytes(content(**changes))
    found = open_statistics(file)
    with pytest.raises(StatisticsError, match=said) as raised:
        found.moments(name)
    assert str(file) in raised.value.message
    other = "a.q.weight" if name == "b.weight" else "b.weight"
    found.moments(other)


def test_rounding_is_no_asymmetry(file):
    file.write_bytes(content(full=[2, -1, -1.00001, 3]))
    assert open_statistics(file).moments("a.q.weight")[1, 0] < -1


def test_asymmetry_is_seen_in_matrices_of_any_size(tmp_path):
    values = torch.eye(900)
    values[800, 3] = 0.5
    path = tmp_path / "stats.safetensors"
    with StatisticsWriter(path, ["a.weight"]) as writer:
        writer.add(["a.weight"], values, 1)
        writer.publish()
    with pytest.raises(StatisticsError, match=r"two values differ by 0\.5 of 1"):
        open_statistics(path).moments("a.weight")


def test_matrices_without_an_entry_or_of_another_width_are_named(file):
    found = open_statistics(file)
    for ask in (found.moments, found.kind, found.tokens):
        with pytest.raises(MissingStatisticsError, match=r"nothing for tensor 'c\.weight'"):
            ask("c.weight")
    with pytest.raises(MissingStatisticsError, match="'c', 'd', 'e' and 2 more"):
        found.require(dict.fromkeys(("c", "d", "b.weight", "e", "f", "g"), 3))
    for request in (lambda: found.require({"b.weight": 4}), lambda: found.moments("b.weight", 4)):
        with pytest.raises(StatisticsError, match=r"'b\.weight' has 4 inputs, 3 were measured"):
            request()


def test_a_file_that_shrinks_is_an_error_and_not_a_crash(file):
    found = open_statistics(file)
    shorten(file)
    with pytest.raises(CorruptFileError, match="ends at byte"):
        found.moments("b.weight")
    with pytest.raises(CorruptFileError, match="cut short"):
        open_statistics(file)


def test_a_damaged_header_is_named(file):
    flip_bit(file, 9)
    with pytest.raises(CorruptFileError, match=r"stats\.safetensors: the header"):
        open_statistics(file)


@pytest.mark.parametrize("raw", [b"", b"abc", b"\0" * 40, b"some notes about a model, in words"])
def test_other_files_are_refused(file, raw):
    file.write_bytes(raw)
    with pytest.raises((CorruptFileError, UnsupportedInputError)) as raised:
        open_statistics(file)
    assert str(file) in raised.value.message


def test_no_file_at_all(tmp_path):
    with pytest.raises(SourceNotFoundError, match="none: no such file"):
        open_statistics(tmp_path / "none")
    with pytest.raises(UnsupportedInputError, match="not a file"):
        open_statistics(tmp_path)
