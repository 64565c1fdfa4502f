"""The hub source, with the real huggingface_hub client against a server on 127.0.0.1."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loftq_cli.checkpoint.hub.listing import HubSnapshot, RemoteFile
from loftq_cli.errors import CorruptFileError, SourceNotFoundError
from tests.support.hub_models import (
    INDEX,
    META,
    SHARDS,
    SINGLE,
    SMALL,
    UNWANTED,
    contents,
    failure,
    fetch,
    index,
    shard,
    silent,
    weights,
)
from tests.support.hub_server import Fault, HubServer

# What arrives


def test_single_file(server: HubServer, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    commit = server.publish("org/model", {**SMALL, **UNWANTED, SINGLE: weights(0)})
    snapshot = fetch("org/model", say=silent)
    assert snapshot == HubSnapshot(
        cache / "models--org--model" / "snapshots" / commit,
        "org/model",
        commit,
        None,
        {SINGLE: RemoteFile(70_000, hashlib.sha256(weights(0)).hexdigest())},
    )
    assert contents(snapshot) == {**SMALL, SINGLE: weights(0)}
    assert sorted(server.downloads()) == sorted([*SMALL, SINGLE])
    assert capfd.readouterr() == ("", "")


def test_only_the_shards_of_the_index(server: HubServer) -> None:
    wanted = {**SMALL, **SHARDS, INDEX: index(shard(1), shard(2), shard(1))}
    server.publish("org/model", {**wanted, **UNWANTED, "consolidated.safetensors": weights(9)})
    assert contents(fetch("org/model", say=silent)) == wanted
    assert server.downloads()[-2:] == [shard(1), shard(2)]


def test_a_single_file_wins_over_an_index(server: HubServer) -> None:
    files = {**SMALL, **SHARDS, INDEX: index(shard(1), shard(2)), SINGLE: weights(0)}
    server.publish("org/model", files)
    assert contents(fetch("org/model", say=silent)) == {**SMALL, SINGLE: weights(0)}


def test_what_is_in_the_cache_is_not_downloaded_again(server: HubServer) -> None:
    server.publish("org/model", {**SMALL, SINGLE: weights(0)})
    first = fetch("org/model", say=silent)
    server.requests.clear()
    assert fetch("org/model", say=silent) == first
    assert server.downloads() == []


@pytest.mark.parametrize("offline", [False, True])
def test_what_was_damaged_in_the_cache_is_noticed_and_left_there(
    server: HubServer, offline: bool
) -> None:
    server.publish("org/model", {**SMALL, SINGLE: weights(0)})
    path = fetch("org/model", say=silent).directory / SINGLE
    damaged = weights(0)[:-1] + b"x"
    path.write_bytes(damaged)
    error = failure(offline=offline)
    assert isinstance(error, CorruptFileError)
    assert error.message == f"{path} is damaged: its sha256 is not the hub's"
    assert str(path.resolve()) in error.hint
    assert path.read_bytes() == damaged


def test_a_private_model_with_a_token(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.publish("org/model", {**SMALL, SINGLE: weights(0)})
    server.repositories["org/model"].token = "hf_secret"
    assert "private" in failure().message
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetch("org/model", say=silent).repo_id == "org/model"


# Which commit


def test_revisions(server: HubServer) -> None:
    old = server.publish("org/model", {**SMALL, SINGLE: weights(1)}, branch="v1")
    new = server.publish("org/model", {**SMALL, SINGLE: weights(2)})
    pull = server.publish("org/model", {**SMALL, SINGLE: weights(3)}, branch="refs/pr/4")
    found = {
        revision: fetch("org/model", revision, say=silent)
        for revision in (None, "main", "v1", old, "refs/pr/4")
    }
    assert [snapshot.revision for snapshot in found.values()] == [new, new, old, old, pull]
    assert contents(found["v1"])[SINGLE] == weights(1)
    assert contents(found["refs/pr/4"])[SINGLE] == weights(3)


def test_a_branch_that_moves_meanwhile(server: HubServer) -> None:
    wanted = {**SMALL, SINGLE: weights(1)}
    old = server.publish("org/model", wanted)
    moved = {**SMALL, "config.json": b"{}\n", SINGLE: weights(2)}
    server.repositories["org/model"].after_listing = lambda: server.publish("org/model", moved)
    snapshot = fetch("org/model", say=silent)
    assert snapshot.revision == old
    assert contents(snapshot) == wanted


# The twin


def test_the_twin_of_metas_files(server: HubServer) -> None:
    server.publish("org/model", META)
    commit = server.publish("org/model-hf", {**SMALL, SINGLE: weights(0)})
    said: list[str] = []
    snapshot = fetch("org/model", say=said.append)
    assert said == ["org/model holds Meta's original files; using its twin org/model-hf"]
    assert dataclasses.astuple(snapshot)[1:4] == ("org/model-hf", commit, "org/model")
    assert contents(snapshot) == {**SMALL, SINGLE: weights(0)}
    assert sorted(server.downloads()) == sorted([*SMALL, SINGLE])


def test_no_twin_is_needed_beside_safetensors(server: HubServer) -> None:
    server.publish("org/model", {**SMALL, **META, SINGLE: weights(0)})
    server.publish("org/model-hf", {**SMALL, SINGLE: weights(1)})
    assert contents(fetch("org/model", say=silent))[SINGLE] == weights(0)


def test_metas_files_without_a_twin(server: HubServer) -> None:
    server.publish("org/model", META)
    error = failure()
    assert isinstance(error, SourceNotFoundError)
    assert error.exit_code == 3
    assert "there is no org/model-hf" in error.message


def test_a_twin_that_is_gated_names_its_own_page(server: HubServer) -> None:
    server.publish("org/model", META)
    server.publish("org/model-hf", {**SMALL, SINGLE: weights(0)})
    server.repositories["org/model-hf"].fault = Fault(
        status=403, headers={"X-Error-Code": "GatedRepo"}
    )
    assert f"{server.url}/org/model-hf" in failure().hint


def test_the_revision_holds_for_the_twin(server: HubServer) -> None:
    original = server.publish("org/model", META, branch="v1")
    server.publish("org/model-hf", {**SMALL, SINGLE: weights(1)})
    twin = server.publish("org/model-hf", {**SMALL, SINGLE: weights(0)}, branch="v1")
    said: list[str] = []
    assert fetch("org/model", "v1", say=said.append).revision == twin
    assert failure(revision=original).message == f"org/model-hf has no revision '{original}'"


# As a user's process sees it: the library reads its environment at import


SCRIPT = """
import sys
from loftq_cli.checkpoint.hub.repository import fetch
from loftq_cli.checkpoint.request import Request
from loftq_cli.checkpoint.hub.shards import HubSupply
from loftq_cli.errors import LoftqError
try:
    snapshot = fetch(Request(sys.argv[1]), lambda line: print("said", line))
    supply = HubSupply(snapshot)
    for name in snapshot.shards:
        supply.ensure(name)
except LoftqError as error:
    sys.exit(f"{error.exit_code}: {error}")
assert "torch" not in sys.modules
print(snapshot.directory, snapshot.resolved_from)
"""


def run(repo_id: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {"PATH": os.environ["PATH"], "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, repo_id],
        env={**kept, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_in_a_process_of_its_own(server: HubServer, tmp_path: Path) -> None:
    server.publish("org/model", META)
    commit = server.publish("org/model-hf", {**SMALL, SINGLE: weights(0)})
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url}
    directory = tmp_path / "home/hub/models--org--model-hf/snapshots" / commit

    online = run("org/model", **home)
    assert (online.returncode, online.stderr) == (0, "")
    assert online.stdout.splitlines()[1] == f"{directory} org/model"
    assert (directory / SINGLE).read_bytes() == weights(0)

    server.requests.clear()
    offline = run("org/model", **home, HF_HUB_OFFLINE="1")
    assert offline.stdout.splitlines()[1] == f"{directory} org/model"
    assert server.requests == []

    (directory / SINGLE).unlink()
    incomplete = run("org/model", **home, HF_HUB_OFFLINE="1")
    assert incomplete.returncode == 1
    assert incomplete.stderr.startswith("5: org/model-hf is not complete")
    assert incomplete.stderr.count("\n") == 1
