"""Checkpoint directories: what is a source, and every fault of one that is not, in one message."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loftq_cli.checkpoint.locate import locate
from loftq_cli.checkpoint.request import Request
from loftq_cli.checkpoint.source import open_source
from loftq_cli.errors import (
    CorruptFileError,
    InputError,
    LoftqError,
    SourceNotFoundError,
    UnsupportedInputError,
)
from tests.support.makers import container, entry, shorten

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
A, B, C = (torch.full((2, 3), float(value)) for value in (1, 2, 3))


def checkpoint(directory: Path, shards: dict[str, dict[str, torch.Tensor]], **index: str) -> Path:
    """A checkpoint with these shards; ``index``, if any, maps tensor names to shards."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    for name, tensors in shards.items():
        save_file(tensors, directory / name)
    if index:
        (directory / INDEX).write_text(json.dumps({"weight_map": index}))
    return directory


@pytest.fixture
def sharded(tmp_path):
    """Two shards: a and b in the first, c in the second."""
    return checkpoint(
        tmp_path / "source",
        {FIRST: {"a": A, "b": B}, SECOND: {"c": C}},
        a=FIRST,
        b=FIRST,
        c=SECOND,
    )


def failure(directory: Path | str, kind: type[LoftqError]) -> str:
    """The message of opening ``directory``, which must raise exactly ``kind``, with a hint."""
    with pytest.raises(LoftqError) as caught:
        locate(Request(str(directory)), lambda line: None)
    assert type(caught.value) is kind
    assert caught.value.exit_code == 3
    assert caught.value.hint
    assert str(caught.value).isprintable()
    return caught.value.message


def test_a_single_file(tmp_path):
    directory = checkpoint(tmp_path / "source", {SINGLE: {"b": B, "a": A}})
    source = open_source(directory)
    config = b'{"model_type": "llama"}'
    assert [shard.name for shard in source.shards] == [SINGLE]
    assert [tensor.name for tensor in source.tensors] == ["a", "b"]
    assert source.config.content == {"model_type": "llama"}
    assert source.config.size == len(config)
    assert source.config.sha256 == hashlib.sha256(config).hexdigest()
    assert (source.index, source.revision, source.resolved_from) == (None, None, None)
    assert source.id == str(directory)


def test_an_index_and_its_shards_in_order(sharded):
    source = open_source(sharded, source_id="org/model", revision="c0ffee", resolved_from="org/m")
    assert [shard.name for shard in source.shards] == [FIRST, SECOND]
    assert [tensor.name for tensor in source.tensors] == ["a", "b", "c"]
    assert source.index is not None
    assert (source.id, source.revision, source.resolved_from) == ("org/model", "c0ffee", "org/m")


def test_a_single_file_wins_over_an_index(sharded):
    save_file({"d": A}, sharded / SINGLE)
    source = open_source(sharded)
    assert [tensor.name for tensor in source.tensors] == ["d"]
    assert source.index is None


def test_shards_may_be_links_as_in_the_hub_cache(sharded, tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "c0ffee", tmp_path / "blobs"
    shutil.move(sharded, snapshot)
    blobs.mkdir()
    for name in (FIRST, SECOND, INDEX, "config.json"):
        shutil.move(snapshot / name, blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert len(open_source(snapshot).tensors) == 3
    (tmp_path / "link").symlink_to(snapshot)
    assert len(open_source(tmp_path / "link").tensors) == 3


def test_links_within_the_directory_are_followed(sharded):
    shutil.move(sharded / FIRST, sharded / "other")
    (sharded / FIRST).symlink_to("other")
    assert len(open_source(sharded).tensors) == 3


@pytest.mark.parametrize("name", [FIRST, INDEX, "config.json", "tokenizer.json", "LICENSE"])
def test_links_out_of_the_directory_are_refused(sharded, tmp_path, name):
    outside = tmp_path / "outside"
    if (sharded / name).exists():
        shutil.move(sharded / name, outside)
    else:
        outside.write_text("secret")
    (sharded / name).symlink_to("../outside")
    assert failure(sharded, CorruptFileError) == (
        f"{sharded}: {name}: a link out of the directory, to {outside}"
    )


def test_what_is_not_read_may_be_a_link_to_anywhere(sharded):
    (sharded / "notes.txt").symlink_to("/etc/passwd")
    assert len(open_source(sharded).tensors) == 3


def test_a_file_to_be_copied_is_limited_in_size(sharded):
    (sharded / "tokenizer.json").touch()
    os.truncate(sharded / "tokenizer.json", 256_000_001)
    assert "tokenizer.json: larger than 256 MB" in failure(sharded, CorruptFileError)


def test_tensors_that_the_index_does_not_name_are_there_all_the_same(tmp_path):
    directory = checkpoint(tmp_path / "source", {FIRST: {"a": A, "b": B}}, a=FIRST)
    assert [tensor.name for tensor in open_source(directory).tensors] == ["a", "b"]


def test_every_fault_is_in_the_one_message(tmp_path):
    directory = checkpoint(
        tmp_path / "source",
        {"one": {"a": A, "twice": B}, "two": {"b": B, "twice": C}, "short": {"c": C}},
        a="two",
        nowhere="one",
        b="two",
        twice="two",
        c="short",
        d="missing",
    )
    shorten(directory / "short")
    message = failure(directory, CorruptFileError)
    assert "5 faults" in message
    for part in (
        "missing: missing, the index names it",
        "short: the file is cut short",
        "tensor 'twice' is in one and again in two",
        "the index puts tensor 'a' in two, which does not hold it, one does",
        "the index puts tensor 'nowhere' in one, which does not hold it;",
    ):
        assert part in message + ";"


def test_a_single_fault_is_not_counted(sharded):
    (sharded / SECOND).unlink()
    assert failure(sharded, CorruptFileError) == (
        f"{sharded}: {SECOND}: missing, the index names it"
    )


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "..",
        ".",
        "",
        "a\0b",
        "\ud800.safetensors",
        None,
        3,
        ["model.safetensors"],
        {},
    ],
)
def test_an_index_names_files_beside_it_and_nothing_else(tmp_path, name):
    directory = checkpoint(tmp_path / "source", {})
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    message = failure(directory, CorruptFileError)
    assert INDEX in message
    assert "tensor 'a' points to" in message


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]", "{"])
def test_an_index_without_a_map(tmp_path, content):
    directory = checkpoint(tmp_path / "source", {})
    (directory / INDEX).write_text(content)
    assert INDEX in failure(directory, CorruptFileError)


def test_an_index_with_a_tensor_twice(tmp_path):
    directory = checkpoint(tmp_path / "source", {})
    (directory / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}')
    assert "the key 'a' occurs twice" in failure(directory, CorruptFileError)


def test_a_long_tensor_name_does_not_drown_the_message(tmp_path):
    directory = checkpoint(tmp_path / "source", {FIRST: {"a": A}}, **{"n" * 100_000: FIRST})
    assert len(failure(directory, CorruptFileError)) < 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"a": [{"b": "\\ud800"}]}', "not valid Unicode"),
        (b'{"\\udfff": 1}', "not valid Unicode"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested too deeply"),
        (
            b'{"architectures": "LlamaForCausalLM"}',
            "architectures 'LlamaForCausalLM' is not a list",
        ),
        (b'{"architectures": {"a": "b"}}', "is not a list of names"),
        (b'{"architectures": [1]}', "architectures [1] is not a list of names"),
        (b'{"architectures": 5}', "architectures 5 is not a list of names"),
    ],
)
def test_a_broken_config(sharded, content, message):
    (sharded / "config.json").write_bytes(content)
    found = failure(sharded, CorruptFileError)
    assert str(sharded / "config.json") in found
    assert message in found


@pytest.mark.parametrize("architectures", [None, [], ["LlamaForCausalLM"]])
def test_a_config_may_lack_its_architectures(sharded, architectures):
    content = {"architectures": architectures}
    (sharded / "config.json").write_text(json.dumps(content))
    assert open_source(sharded).config.content == content


def test_no_config(sharded):
    (sharded / "config.json").unlink()
    assert "config.json: missing" in failure(sharded, SourceNotFoundError)


@pytest.mark.parametrize("name", ["config.json", FIRST, INDEX])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_not_a_file_is_not_opened(sharded, name, make):
    (sharded / name).unlink()
    make(sharded / name)
    message = failure(sharded, CorruptFileError)
    assert name in message
    assert "not a regular file" in message


def test_a_shard_that_is_not_safetensors(sharded):
    (sharded / SECOND).write_bytes(b"PK\x03\x04 a zip file, or so it seems")
    message = failure(sharded, CorruptFileError)
    assert f"{SECOND}: not a safetensors file" in message


def test_a_file_without_tensors(tmp_path):
    directory = checkpoint(tmp_path / "source", {SINGLE: {}})
    assert "no tensors at all" in failure(directory, CorruptFileError)


def test_a_path_that_is_not_there(tmp_path):
    assert "no such file or directory" in failure(tmp_path / "none", SourceNotFoundError)
    assert "no such file or directory" in failure("./none", SourceNotFoundError)


@pytest.mark.parametrize("model", ["x" * 5000, "/" + "x" * 5000, "", "a\0b", "/a\0b"])
def test_a_path_that_cannot_be(model):
    failure(model, SourceNotFoundError)


def test_a_file_instead_of_a_directory(sharded):
    assert "is a file, not a directory" in failure(sharded / FIRST, SourceNotFoundError)


def test_a_relative_path_that_exists_needs_no_dot(sharded, monkeypatch):
    monkeypatch.chdir(sharded.parent)
    source = locate(Request("source"), lambda line: None)
    assert source.id == "source"
    assert len(source.tensors) == 3


def test_a_directory_without_weights(tmp_path):
    directory = checkpoint(tmp_path / "source", {})
    assert f"no {SINGLE} and no {INDEX}" in failure(directory, SourceNotFoundError)


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["pytorch_model.bin"], UnsupportedInputError),
        (["consolidated.00.pth", "consolidated.01.pth"], UnsupportedInputError),
        (["model.pt", "training_args.bin"], UnsupportedInputError),
        (["model.gguf"], SourceNotFoundError),
    ],
)
def test_weights_of_another_kind_are_named(tmp_path, files, kind):
    directory = checkpoint(tmp_path / "source", {})
    for name in files:
        (directory / name).write_bytes(b"not to be opened")
    message = failure(directory, kind)
    assert all(name in message for name in files)
    assert ("pickled" in message) == (kind is UnsupportedInputError)


def test_an_index_larger_than_100_mb_is_not_read(sharded):
    os.truncate(sharded / INDEX, 100_000_001)
    assert "larger than 100 MB" in failure(sharded, CorruptFileError)


def test_names_from_files_cannot_drive_a_terminal(tmp_path):
    directory = checkpoint(tmp_path / "source", {})
    name = "\x1b[2J\u202e"
    (directory / SINGLE).write_bytes(container({name: entry("U8", [2], 0, 1)}, b"!"))
    assert name not in failure(directory, CorruptFileError)  # and printable, as failure() checks


def test_every_error_of_a_source_is_an_input_error():
    kinds: list[Any] = [CorruptFileError, SourceNotFoundError, UnsupportedInputError]
    assert all(issubclass(kind, InputError) for kind in kinds)
