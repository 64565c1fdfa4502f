"""Small files are replaced whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from loftq_cli.checkpoint import durable
from loftq_cli.checkpoint.durable import explained, file_sha256, pretty_json, write_file
from loftq_cli.errors import EnvironmentFailure


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "config.json"
    for content in (b"first", b"", b"x" * 100_000):
        write_file(path, content)
        assert path.read_bytes() == content
        assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_an_error_in_between_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "config.json"
    write_file(path, b"old")

    def fail(*args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(EnvironmentFailure, match=r"config\.json: No space left") as caught:
        write_file(path, b"new")
    assert caught.value.exit_code == 5
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["config.json"]


def test_the_contents_are_durable_before_the_name_is(tmp_path, monkeypatch):
    path, calls = tmp_path / "f", []

    def recording(name: str):
        original = getattr(os, name)

        def call(*args: object) -> object:
            calls.append(name)
            return original(*args)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, recording(name))
    write_file(path, b"content")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the directory


def test_short_writes_are_continued(tmp_path, monkeypatch):
    whole = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, view: whole(descriptor, view[:3]))
    write_file(tmp_path / "f", b"0123456789")
    assert (tmp_path / "f").read_bytes() == b"0123456789"


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(EnvironmentFailure, match=r"none/\.f\.\w+\.tmp: No such file or directory"):
        write_file(tmp_path / "none" / "f", b"")


def test_an_error_without_a_file_name_gets_one(tmp_path):
    with pytest.raises(EnvironmentFailure, match="here: unlucky"), explained(tmp_path / "here"):
        raise OSError("unlucky")


def test_hashes_are_of_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "_PIECE", 7)
    content = bytes(range(256))
    (tmp_path / "f").write_bytes(content)
    assert file_sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_json_is_sorted_utf8_and_ends_its_line():
    assert (
        pretty_json({"b": [1.5], "a": "ü"})
        == '{\n  "a": "ü",\n  "b": [\n    1.5\n  ]\n}\n'.encode()
    )


def test_json_holds_file_names_that_are_not_utf8():
    name = os.fsdecode(b"caf\xe9")
    assert json.loads(pretty_json({"id": name}).decode("utf-8")) == {"id": name}
