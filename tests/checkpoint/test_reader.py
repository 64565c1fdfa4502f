"""Reading tensors: the bytes, their hash, and files that change under the reader."""

from __future__ import annotations

import hashlib
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from loftq_cli.checkpoint import reader
from loftq_cli.checkpoint.dtypes import torch_dtype
from loftq_cli.checkpoint.header import TensorSpec, read_header
from loftq_cli.checkpoint.reader import ShardReader, TensorFile, as_tensor
from loftq_cli.checkpoint.source import Shard
from loftq_cli.errors import CorruptFileError, EnvironmentFailure, SourceChangedError
from tests.support.makers import flip_bit, shorten


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        f"t.{tag}": torch.randint(0, 200, (5, 7), generator=generator).to(torch_dtype(tag))
        for tag in ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "I8")
    } | {"t.empty": torch.empty(0, 3), "t.scalar": torch.tensor(7.0)}


@pytest.fixture
def shard(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    return Shard(path.name, path, read_header(path))


def test_tensors_are_those_of_the_library(shard):
    expected = load_file(shard.path)
    with TensorFile(shard.path) as file:
        for tensor in reversed(shard.header.tensors):  # in any order
            actual = file.read(tensor)
            assert actual.dtype == expected[tensor.name].dtype
            assert torch.equal(actual, expected[tensor.name])


@pytest.mark.parametrize("piece", [1, 7, 16, 1 << 20])
def test_pieces_join_to_the_bytes(shard, monkeypatch, piece):
    monkeypatch.setattr(reader, "PIECE", piece)
    content = shard.path.read_bytes()
    with TensorFile(shard.path) as file:
        for tensor in shard.header.tensors:
            pieces = list(file.pieces(tensor))
            assert all(0 < len(part) <= piece for part in pieces)
            assert b"".join(pieces) == content[tensor.start : tensor.start + tensor.nbytes]


def test_a_shard_read_in_order_is_hashed_as_a_whole(shard):
    content = shard.path.read_bytes()
    with ShardReader(shard) as file:
        for number, tensor in enumerate(shard.header.tensors):
            if number % 2:
                assert torch.equal(file.read(tensor), load_file(shard.path)[tensor.name])
            else:
                assert b"".join(file.pieces(tensor)) == content[tensor.start :][: tensor.nbytes]
            so_far = content[: tensor.start + tensor.nbytes]
            assert file.sha256 == hashlib.sha256(so_far).hexdigest()
    assert file.sha256 == hashlib.sha256(content).hexdigest()


def test_a_shard_out_of_order_is_refused(shard):
    with ShardReader(shard) as file:
        file.read(shard.header.tensors[1])
        with pytest.raises(AssertionError, match="file order"):
            file.read(shard.header.tensors[0])


def test_what_is_left_out_is_hashed(shard):
    with ShardReader(shard) as file:
        file.read(shard.header.tensors[-1])
        file.finish()
        assert file.sha256 == hashlib.sha256(shard.path.read_bytes()).hexdigest()


@pytest.mark.parametrize("method", ["read", "pieces"])
def test_a_file_shortened_after_it_was_opened(shard, method):
    last = max(shard.header.tensors, key=lambda tensor: tensor.start + tensor.nbytes)
    with TensorFile(shard.path) as file:
        shorten(shard.path)
        with pytest.raises(CorruptFileError, match="shortened while being read") as caught:
            list(getattr(file, method)(last))
    assert str(shard.path) in caught.value.message


def test_a_header_that_changed_since_the_check(shard):
    flip_bit(shard.path, 12)
    with pytest.raises(SourceChangedError, match=r"model\.safetensors: the header changed"):
        ShardReader(shard)


def test_a_file_shortened_into_its_header(shard):
    os.truncate(shard.path, 10)
    with pytest.raises(CorruptFileError, match="ends at byte 10"):
        ShardReader(shard)


@pytest.mark.parametrize("damage", ["header", "length"])
def test_a_refused_shard_is_closed(shard, damage):
    if damage == "header":
        flip_bit(shard.path, 12)
    else:
        os.truncate(shard.path, 10)
    before = os.listdir("/proc/self/fd")
    for _ in range(5):
        with pytest.raises((SourceChangedError, CorruptFileError)):
            ShardReader(shard)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_file_that_is_gone(shard):
    shard.path.unlink()
    with pytest.raises(EnvironmentFailure, match=r"model\.safetensors: No such file"):
        ShardReader(shard)


def test_an_io_error_names_the_file(shard, monkeypatch):
    def fail(*args: object) -> int:
        raise OSError(5, "Input/output error")

    with TensorFile(shard.path) as file:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(EnvironmentFailure, match=r"model\.safetensors: Input/output error"):
            file.read(shard.header.tensors[0])


def test_short_reads_are_continued(shard, monkeypatch):
    whole = os.preadv

    def at_most_three(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return whole(descriptor, [buffers[0][:3]], offset)

    monkeypatch.setattr(os, "preadv", at_most_three)
    expected = load_file(shard.path)
    with TensorFile(shard.path) as file:
        for tensor in shard.header.tensors:
            assert torch.equal(file.read(tensor), expected[tensor.name])


def test_an_empty_tensor_needs_no_bytes():
    assert as_tensor(TensorSpec("e", "BF16", (0, 5)), bytearray()).shape == (0, 5)
