"""``loftq push`` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import checkpoints
from tests.support.commands import Command
from tests.support.hub_fixtures import cache, server
from tests.support.hub_server import HubServer

__all__ = ["cache", "server"]

KEYS = {"repo_id", "revision", "commit", "url", "private", "files", "bytes"}


@pytest.fixture(autouse=True)
def _token(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_write")


def test_a_conversion_is_sent(server: HubServer, out: Path, loftq: Command) -> None:
    result = loftq("push", "out", "me/small", "--private", "--revision", "two", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert set(found) == KEYS
    assert (found["repo_id"], found["revision"], found["private"]) == ("me/small", "two", True)
    files = server.files("me/small", "two")
    assert checkpoints.files(out).keys() <= files.keys()
    assert files["README.md"].startswith(b"---\n")


def test_the_summary_names_repository_and_commit(
    server: HubServer, out: Path, loftq: Command
) -> None:
    result = loftq("push", "out", "me/small")
    assert f"sent to {server.url}/me/small" in result.stdout
    assert server.repositories["me/small"].refs["main"] in result.stdout
    assert "names no base model" in result.stderr


def test_what_was_altered_is_refused(server: HubServer, out: Path, loftq: Command) -> None:
    (out / "config.json").write_text("{}")
    result = loftq("push", "out", "me/small")
    assert (result.exit_code, result.stdout) == (3, "")
    (line,) = result.stderr.splitlines()
    assert "config.json" in line
    assert server.requests == []


def test_a_partial_conversion_is_refused(place: Path, loftq: Command) -> None:
    (place / ".out.loftq-partial").mkdir()
    assert loftq("push", "out", "me/small").exit_code == 3
