"""The lock on an output, held by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from loftq_cli.conversion.workspace import ConversionWorkspace
from loftq_cli.errors import EnvironmentFailure, OutputConflictError


def test_nothing_is_left_of_a_lock_that_was_held_for_nothing(tmp_path: Path) -> None:
    with ConversionWorkspace(tmp_path / "out").locked():
        assert (tmp_path / ".out.loftq-partial/lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_held_is_refused_and_stays(tmp_path: Path) -> None:
    first, second = ConversionWorkspace(tmp_path / "out"), ConversionWorkspace(tmp_path / "out")
    with first.locked():
        with pytest.raises(OutputConflictError, match="another process"), second.locked():
            pass
        assert (tmp_path / ".out.loftq-partial/lock").exists()
    with second.locked():
        pass


def test_whoever_comes_after_publishing_keeps_his_lock(tmp_path: Path) -> None:
    first, second = ConversionWorkspace(tmp_path / "out"), ConversionWorkspace(tmp_path / "out")
    lock = tmp_path / ".out.loftq-partial/lock"
    holder = first.locked()
    holder.__enter__()
    shutil.rmtree(first.partial)  # as publishing ends
    with second.locked():
        holder.__exit__(None, None, None)
        assert lock.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_vanishes_under_the_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / ".out.loftq-partial/lock"
    real, opened = os.open, []

    def vanishing(path: Any, *arguments: Any, **options: Any) -> int:
        if path == lock:
            opened.append(path)
            if len(opened) == 1:  # another process has just finished and removed it
                shutil.rmtree(lock.parent)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", vanishing)
    with ConversionWorkspace(tmp_path / "out").locked():
        assert lock.exists()
    assert len(opened) == 2


def test_files_that_are_not_ours_stay(tmp_path: Path) -> None:
    partial = tmp_path / ".out.loftq-partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    (tmp_path / ".other.loftq-partial").mkdir()
    with ConversionWorkspace(tmp_path / "out").locked():
        pass
    assert [path.name for path in partial.iterdir()] == ["notes.txt"]
    assert (tmp_path / ".other.loftq-partial").exists()


def test_a_lock_that_cannot_be_had_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    before = len(os.listdir("/proc/self/fd"))
    with (
        pytest.raises(EnvironmentFailure, match=r"lock: No locks available"),
        ConversionWorkspace(tmp_path / "out").locked(),
    ):
        pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_output_that_comes_into_being_at_the_last_moment_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge and a conversion have locks of their own, so that both may get this far."""
    workspace, real = ConversionWorkspace(tmp_path / "out"), os.rename

    def rename(source: Path, target: Path) -> None:
        if source == workspace.output:
            target.mkdir()
            (target / "theirs").touch()
        real(source, target)

    with workspace.locked():
        workspace.output.mkdir()
        monkeypatch.setattr(os, "rename", rename)
        with pytest.raises(OutputConflictError, match="by another process meanwhile"):
            workspace.publish(overwrite=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
