"""What a pickle may ask for, opcode by opcode; the hostile ones are written by hand."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loftq_cli.checkpoint.header import HeaderError
from loftq_cli.checkpoint.pickles import check as pickle_check
from loftq_cli.checkpoint.pickles.reader import read_header

ORDERED = b"ccollections\nOrderedDict\n"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def saved(content: Any) -> bytes:
    """The pickle that torch.save writes for ``content``."""
    file = io.BytesIO()
    torch.save(content, file)
    with zipfile.ZipFile(file) as archive:
        return archive.read("archive/data.pkl")


TEXT, FLOATS = b"X\x01\x00\x00\x00a", b"ctorch\nFloatStorage\n"


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def pickled(*pieces: bytes) -> bytes:
    return b"\x80\x02" + b"".join(pieces) + b"."


@pytest.mark.parametrize(
    "content",
    [
        torch.nn.LSTM(4, 4).state_dict(),  # with _metadata, an attribute
        {"a": torch.nn.Parameter(torch.ones(2, 3)), "b": torch.zeros(())},
        {"a": torch.ones((1,) * 60)},
        {f"layer.{index}": torch.ones(1, dtype=torch.bfloat16) for index in range(300)},
        {"a": torch.ones(2, dtype=torch.uint16), "b": torch.ones(2, dtype=torch.float8_e4m3fn)},
        {"a": torch.ones(2), "lists": [1, 2.5, None, True, [], {}, 1 << 40], "": ()},
    ],
)
def test_what_torch_saves_passes(content: Any) -> None:
    pickle_check.check(saved(content))


def test_a_storage_of_more_than_two_thousand_million_elements_passes() -> None:
    long = b"\x8a\x05" + (1 << 33).to_bytes(5, "little")
    content = saved({"a": torch.ones(3)})
    assert content.count(b"K\x03") == 2  # of the storage, and the shape
    pickle_check.check(content.replace(b"K\x03", long))


NESTED = b")q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(60))  # a hash takes 2^60 steps


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickled(b"c__builtin__\nbytearray\n", number(1 << 30), b"\x85R"), "bytearray"),
        (pickled(b"ctorch.storage\nUntypedStorage\n", number(1 << 30), b"\x85R"), "a call of"),
        (pickled(b"ctorch\nFloatStorage\n", number(1 << 30), b"\x85R"), "a call of"),
        (pickled(b"ctorch\nempty\n", number(1 << 30), b"\x85R"), "'torch empty'"),
        (pickled(b"ctorch\nTensor\n)\x81"), "'torch Tensor'"),
        (pickled(b"cposix\nsystem\nX\x02\x00\x00\x00ls\x85R"), "'posix system'"),
        (pickled(ORDERED, b"]\x85R"), "OrderedDict of 'a tuple'"),
        (pickled(ORDERED, b")R", b"}b" * 17), "attributes are set 17 times"),
        (pickled(b"}", NESTED, b"Ns"), "the key of a dict is 'a tuple'"),
        (pickled(b"}", b"\x8a\x08" + (1 << 61).to_bytes(8, "little"), b"Ns"), "'large number'"),
        (pickled(b"}", b"G" + bytes(8), b"Ns"), "the key of a dict is 'float'"),
        (pickled(NESTED, b"(", TEXT, FLOATS, b"h\x00", TEXT, b"K\x02tQ"), "a persistent id of"),
        (pickled(b"(", TEXT, TEXT, TEXT, TEXT, b"K\x02tQ"), "a persistent id of"),
        (pickled(b"(", TEXT, FLOATS, TEXT, b"K\x02tQ"), "a persistent id of"),
        (b"\x80\x05" + pickled(), "saved with pickle protocol 5"),
        (pickled(b"(", number(1) * 65, b"t"), "tuple of 65"),
        (pickled(TENSOR, b")R)R"), "a call of 'tensor'"),
        (pickled(b"ctorch._utils\n_rebuild_parameter_with_state\n"), "attributes of their own"),
        (pickled((TENSOR + b")R") * (pickle_check.MAX_TENSORS + 1)), "more than 100,000 tensors"),
        (pickle.dumps({"a": 1}, protocol=4), "saved with pickle protocol 4"),
        (pickle.dumps({1: {2}}, protocol=3), "'builtins set'"),
        (pickled(b"\x8e" + struct.pack("<Q", 1 << 40)), "a broken pickle"),
        (pickled(b"X\xff\xff\xff\x7f"), "a broken pickle"),
        (pickled(b"u"), "a broken pickle"),
        (pickled(b"h\x07"), "a broken pickle"),
        (pickled(b"R"), "a broken pickle"),
        (b"", "a broken pickle"),
        (b"\x80\x02}", "a broken pickle"),
    ],
)
def test_what_nobody_needs_for_tensors_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(HeaderError, match=message):
        pickle_check.check(content)


def test_there_is_an_end_of_opcodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_check, "_MOST_OPCODES", 1000)
    pickle_check.check(pickled(b"}" * 998))
    with pytest.raises(HeaderError, match="more than 1,000 opcodes"):
        pickle_check.check(pickled(b"}" * 999))


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 400))
def test_only_our_error_escapes(piece: bytes, start: int, length: int) -> None:
    whole = saved(OrderedDict(a=torch.ones(2), b=torch.nn.Parameter(torch.ones(3))))
    for content in (piece, whole[:start] + piece + whole[start + length :]):
        try:
            pickle_check.check(content)
        except HeaderError:
            continue


def test_it_is_checked_before_it_is_unpickled(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, file)
    with zipfile.ZipFile(file) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    bomb = pickled(b"c__builtin__\nbytearray\n", number(1 << 30), b"\x85R")
    with zipfile.ZipFile(file, "w") as target:
        for name, content in entries.items():
            target.writestr(name, bomb if name.endswith("data.pkl") else content)
    with pytest.raises(HeaderError, match="bytearray"):
        read_header(file)
