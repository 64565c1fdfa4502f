"""Small files are replaced whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from loftq_cli.errors import EnvironmentFailure
from loftq_cli.machine import durable
from loftq_cli.machine.durable import (
    explained,
    file_sha256,
    make_directory,
    pretty_json,
    sync_directory,
    sync_tree,
    write_file,
)


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
    assert os.listdir(tmp_path) == ["config.json"]
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


def test_a_name_that_is_too_long_is_to_be_shorter(tmp_path):
    with pytest.raises(EnvironmentFailure, match=r"too long.*shorter name"):
        write_file(tmp_path / ("a" * 300), b"")


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


def test_json_is_never_written_with_what_it_cannot_hold():
    with pytest.raises(ValueError, match="not JSON compliant"):
        pretty_json({"norm": float("nan")})


def test_json_holds_file_names_that_are_not_utf8():
    name = os.fsdecode(b"caf\xe9")
    assert json.loads(pretty_json({"id": name}).decode("utf-8")) == {"id": name}


def test_files_that_happen_to_be_called_like_temporary_ones_stay(tmp_path):
    (tmp_path / ".config.json.tmp").write_bytes(b"mine")
    write_file(tmp_path / "config.json", b"new")
    assert (tmp_path / ".config.json.tmp").read_bytes() == b"mine"


def test_a_new_directory_is_durable_with_all_that_is_above_it(tmp_path, monkeypatch):
    synced: list[Path] = []
    monkeypatch.setattr(durable, "sync_directory", synced.append)
    make_directory(tmp_path / "a/b/c")
    assert (tmp_path / "a/b/c").is_dir()
    assert set(synced) == {tmp_path, tmp_path / "a", tmp_path / "a/b"}
    synced.clear()
    make_directory(tmp_path / "a/b/c")  # who made it may have died before he synced
    assert synced == [tmp_path / "a/b"]


@pytest.mark.parametrize(("code", "tolerated"), [(22, True), (95, True), (5, False), (28, False)])
def test_file_systems_that_cannot_sync_directories(tmp_path, monkeypatch, code, tolerated):
    def fsync(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    if tolerated:
        sync_directory(tmp_path)
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            sync_directory(tmp_path)


def test_a_tree_is_synced_with_every_file_and_directory(tmp_path, monkeypatch):
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("f", "a/g", "a/b/h"):
        (tmp_path / name).touch()
    synced: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}"))
    )
    sync_tree(tmp_path)
    assert set(synced) == {str(tmp_path), *(str(path) for path in tmp_path.rglob("*"))}
    assert len(synced) == 6
