"""The hub source, with the real huggingface_hub client against a server on 127.0.0.1."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from loftq_cli.checkpoint import hub, hub_transfer
from loftq_cli.checkpoint.hub import HubSnapshot, RemoteFile, looks_like_hub_id
from loftq_cli.checkpoint.hub_shards import HubSupply
from loftq_cli.errors import (
    CorruptFileError,
    EnvironmentFailure,
    InterruptedConversion,
    LoftqError,
    SourceNotFoundError,
    UnsupportedInputError,
)
from tests.hub_fixtures import use_endpoint
from tests.hub_server import Fault, HubServer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SMALL = {
    "config.json": b'{"model_type": "llama"}\n',
    "tokenizer.json": bytes(range(256)) * 40,
    "LICENSE.txt": b"a licence\n",
}
UNWANTED = {
    "README.md": b"a model card\n",
    "modeling_llama.py": b"raise SystemExit\n",
    "LICENSE_model.py": b"raise SystemExit\n",
    "pytorch_model.bin": b"a pickle\n",
    "onnx/config.json": b"{}\n",
}
META = {
    "consolidated.00.pth": b"a pickle\n",
    "params.json": b"{}\n",
    "tokenizer.model": b"a tokenizer\n",
}


def shard(number: int) -> str:
    return f"model-{number:05}-of-00002.safetensors"


def weights(seed: int) -> bytes:
    """A safetensors file of 70,000 bytes."""
    entry = {"dtype": "U8", "shape": [69_900], "data_offsets": [0, 69_900]}
    header = json.dumps({"w": entry}).encode().ljust(92)
    data = bytes((seed + i * i) % 251 for i in range(69_900))
    return len(header).to_bytes(8, "little") + header + data


SHARDS = {shard(1): weights(1), shard(2): weights(2)}


def index(*names: object) -> bytes:
    return json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(names)}}).encode()


def fetch(
    repo_id: str, revision: str | None = None, *, say: Callable[[str], None], **options: Any
) -> HubSnapshot:
    """The whole model: its small files, then each of its shards."""
    snapshot = hub.fetch(repo_id, revision, say=say, **options)
    supply = HubSupply(snapshot)
    for name in snapshot.shards:
        assert supply.header(name).size == snapshot.shards[name].size
        supply.ensure(name, lambda nbytes: None)
    return snapshot


def silent(line: str) -> None:
    raise AssertionError(f"said: {line}")


def contents(snapshot: HubSnapshot) -> dict[str, bytes]:
    root = snapshot.directory
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def failure(repo_id: str = "org/model", revision: str | None = None, **kwargs: bool) -> LoftqError:
    """The error of a fetch that fails; that it is one printable line is checked here."""
    with pytest.raises(LoftqError) as caught:
        fetch(repo_id, revision, say=lambda line: None, **kwargs)
    assert str(caught.value).isprintable()
    assert caught.value.hint
    return caught.value


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


# No weights that can be used


def test_only_pickles(server: HubServer) -> None:
    server.publish("org/model", {**SMALL, "pytorch_model-00001-of-00002.bin": b"a pickle"})
    error = failure()
    assert isinstance(error, UnsupportedInputError)
    assert error.exit_code == 3
    assert "--revision refs/pr/N" in error.hint
    assert "--allow-pickle" in error.hint
    assert f"{server.url}/org/model/discussions" in error.hint
    server.publish("org/model", {**SMALL, SINGLE: weights(0)}, branch="refs/pr/9")
    server.publish("org/model", {**SMALL, SINGLE: weights(0)}, branch="refs/pr/10")
    server.publish("org/model", {**SMALL, "README.md": b"better"}, branch="refs/pr/11")
    hint = (
        "use --revision refs/pr/10, a pull request that has safetensors; or download it "
        "(hf download org/model --local-dir DIR) and convert the directory with --allow-pickle"
    )
    assert failure().hint == hint
    assert contents(fetch("org/model", "refs/pr/10", say=silent))[SINGLE] == weights(0)


def test_no_configuration(server: HubServer) -> None:
    server.publish("org/model", {"tokenizer.json": b"{}", SINGLE: weights(0)})
    error = failure()
    assert isinstance(error, SourceNotFoundError)
    assert "no config.json" in error.message


def test_a_cache_that_shares_its_blobs_with_others(server: HubServer) -> None:
    """As with huggingface_hub's shared store, whose files have names of another hash."""
    server.publish("org/model", {**SMALL, SINGLE: weights(0)})
    found = fetch("org/model", say=silent)
    blob = (found.directory / SINGLE).resolve()
    store = blob.parents[2] / "store"
    store.mkdir()
    blob.rename(store / ("0" * 64))
    blob.symlink_to(store / ("0" * 64))
    assert fetch("org/model", offline=True, say=silent) == found


@pytest.mark.parametrize("others", [{}, {"adapter_model.safetensors": b"", "model.gguf": b""}])
def test_no_weights(server: HubServer, others: dict[str, bytes]) -> None:
    server.publish("org/model", {**SMALL, **others})
    error = failure()
    assert isinstance(error, SourceNotFoundError)
    assert f"neither {SINGLE} nor {INDEX}" in error.message


@pytest.mark.parametrize(
    "name",
    [
        "../../evil.safetensors",
        "/evil.safetensors",
        "onnx/model.safetensors",
        "onnx\\model.safetensors",
        "nul\0.safetensors",
        "modeling_llama.py",
        "pytorch_model.bin",
        "..",
        "",
        7,
        None,
    ],
)
def test_an_index_that_names_no_shard(server: HubServer, name: object) -> None:
    nested = {"onnx/model.safetensors": weights(0)}
    files = {**SMALL, **UNWANTED, **SHARDS, **nested, INDEX: index(shard(1), name)}
    server.publish("org/model", files)
    error = failure()
    assert isinstance(error, CorruptFileError)
    assert f"{INDEX} must name safetensors files" in error.message
    assert sorted(server.downloads()) == sorted([*SMALL, INDEX])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"weight_map": 3}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"t": ["a"]}}',
    ],
)
def test_an_index_that_is_none(server: HubServer, content: bytes) -> None:
    server.publish("org/model", {**SMALL, **SHARDS, INDEX: content})
    error = failure()
    assert isinstance(error, CorruptFileError)
    assert INDEX in error.message


def test_missing_shards_are_all_listed_before_any_is_downloaded(server: HubServer) -> None:
    files = {**SMALL, shard(1): weights(1), INDEX: index(shard(1), shard(2), shard(3))}
    server.publish("org/model", files)
    error = failure()
    assert isinstance(error, CorruptFileError)
    assert error.message.endswith(f"{shard(2)}, {shard(3)}")
    assert shard(1) not in server.downloads()


# Offline


def test_offline_uses_the_cache_alone(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.publish("org/model", {**SMALL, **SHARDS, INDEX: index(shard(1), shard(2))})
    server.publish("org/model", {**SMALL, SINGLE: weights(3)}, branch="v3")
    main, v3 = fetch("org/model", say=silent), fetch("org/model", "v3", say=silent)
    server.requests.clear()
    assert fetch("org/model", offline=True, say=silent) == main
    assert fetch("org/model", main.revision, offline=True, say=silent) == main
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("org/model", "v3", say=silent) == v3
    assert server.requests == []


def test_offline_lists_what_is_missing(server: HubServer) -> None:
    server.publish("org/model", {**SMALL, **SHARDS, INDEX: index(shard(1), shard(2))})
    directory = fetch("org/model", say=silent).directory
    (directory / shard(1)).unlink()
    (directory / shard(2)).resolve().unlink()  # the link stays, the blob is gone
    (directory / "config.json").unlink()
    error = failure(offline=True)
    assert isinstance(error, EnvironmentFailure)
    assert error.exit_code == 5
    assert error.message.endswith(f"missing: config.json, {shard(1)}, {shard(2)}")
    (directory / INDEX).unlink()
    assert failure(offline=True).message.endswith(f"missing: config.json, {SINGLE} or {INDEX}")


def test_an_interrupted_download_is_incomplete_offline(server: HubServer) -> None:
    server.publish("org/model", {**SMALL, **SHARDS, INDEX: index(shard(1), shard(2))})
    server.repositories["org/model"].fault = Fault(on="resolve", status=500, file=shard(2))
    failure()
    assert failure(offline=True).message.endswith(f"missing: {shard(2)}")


def test_offline_with_what_another_tool_left_in_the_cache(server: HubServer) -> None:
    server.publish("org/model", {**SMALL, **UNWANTED, SINGLE: weights(0)})
    for name in ("config.json", SINGLE):
        huggingface_hub.hf_hub_download("org/model", name)
    found = contents(fetch("org/model", offline=True, say=silent))
    assert found == {"config.json": SMALL["config.json"], SINGLE: weights(0)}


def test_offline_without_a_snapshot(cache: Path) -> None:
    error = failure(offline=True)
    assert isinstance(error, EnvironmentFailure)
    assert error.message == f"org/model at revision main is not in the hub cache {cache}"
    assert "org/model at revision v7" in failure(revision="v7", offline=True).message


def test_offline_finds_the_twin(server: HubServer) -> None:
    server.publish("org/model", META)
    server.publish("org/model-hf", {**SMALL, SINGLE: weights(0)})
    said: list[str] = []
    online = fetch("org/model", say=said.append)
    assert fetch("org/model", offline=True, say=said.append) == online
    for name in ("params.json", "consolidated.00.pth"):
        huggingface_hub.hf_hub_download("org/model", name)
    assert fetch("org/model", offline=True, say=said.append) == online
    assert (
        said[1:]
        == ["the hub cache has no weights of org/model; using those of its twin org/model-hf"] * 2
    )


# Access


@pytest.mark.parametrize("on", ["api", "resolve", "range"])
@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (401, {"X-Error-Code": "GatedRepo"}, ["gated", "{url}/org/model", "`hf auth login`"]),
        (403, {"X-Error-Code": "GatedRepo"}, ["gated", "{url}/org/model", "`hf auth login`"]),
        (404, {"X-Error-Code": "RepoNotFound"}, ["{url} has no model org/model", "check the id"]),
        (404, {"X-Error-Code": "RevisionNotFound"}, ["org/model has no revision"]),
        (
            401,
            {"X-Error-Message": "Invalid credentials in Authorization header"},
            ["answered 401", "Invalid credentials", "`hf auth login`", "HF_TOKEN"],
        ),
        (403, {"X-Error-Message": "Token lacks\ta scope"}, ["answered 403", "Token lacks a scope"]),
        (429, {}, ["answered 429", "wait"]),
        (500, {}, ["answered 500", "--offline"]),
        (503, {}, ["answered 503", "--offline"]),
    ],
)
def test_refusals(
    server: HubServer, on: str, status: int, headers: dict[str, str], expected: list[str]
) -> None:
    server.publish("org/model", {**SMALL, SINGLE: weights(0)}, branch="v1")
    server.repositories["org/model"].fault = Fault(on=on, status=status, headers=headers)
    error = failure(revision="v1")
    assert type(error) is EnvironmentFailure
    assert error.exit_code == 5
    for part in expected:
        assert part.format(url=server.url) in str(error)


def test_no_such_repository(server: HubServer) -> None:
    assert failure("org/nothing").message.startswith(f"{server.url} has no model org/nothing")


def test_no_such_revision(server: HubServer) -> None:
    server.publish("org/model", {**SMALL, SINGLE: weights(0)})
    assert failure(revision="nope").message == "org/model has no revision 'nope'"


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://no-such-host.invalid", "nonsense"])
def test_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    use_endpoint(monkeypatch, url)
    error = failure()
    huggingface_hub.close_session()
    assert type(error) is EnvironmentFailure
    assert f"org/model could not be read from {url}" in error.message
    assert "--offline" in error.hint


def test_an_answer_that_is_no_hubs(server: HubServer) -> None:
    server.publish("org/model", {})
    server.repositories["org/model"].fault = Fault(on="api", status=200)
    assert type(failure()) is EnvironmentFailure


@pytest.mark.parametrize("text", ["a/b/c", "a b", "a--b", "-a", "org/", "", "org/model.git"])
def test_a_malformed_id(cache: Path, text: str) -> None:
    assert not looks_like_hub_id(text)
    error = failure(text)
    assert isinstance(error, SourceNotFoundError)
    assert error.exit_code == 3


@pytest.mark.parametrize("text", ["gpt2", "meta-llama/Llama-2-7b", "a_b/c.d"])
def test_a_well_formed_id(text: str) -> None:
    assert looks_like_hub_id(text)


# Bytes on the way


def test_a_dropped_connection_is_resumed(server: HubServer) -> None:
    server.publish("org/model", {**SMALL, SINGLE: weights(0)})
    server.repositories["org/model"].fault = Fault(
        "resolve", drop_after=30_000, file=SINGLE, times=2
    )
    assert contents(fetch("org/model", say=silent))[SINGLE] == weights(0)
    assert server.downloads().count(SINGLE) == 3


def test_a_connection_that_always_drops(server: HubServer) -> None:
    server.publish("org/model", {**SMALL, SINGLE: weights(0)})
    server.repositories["org/model"].fault = Fault("resolve", drop_after=0, file=SINGLE)
    error = failure()
    assert type(error) is EnvironmentFailure
    assert f"{SINGLE} of org/model could not be read" in error.message


@pytest.mark.parametrize("on", ["api", "range", "resolve"])
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 8),
        (
            {"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'},
            56,
        ),
    ],
)
def test_a_rate_limit_that_ends(
    server: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    on: str,
    headers: dict[str, str],
    seconds: int,
) -> None:
    server.publish("org/model", {**SMALL, SINGLE: weights(0)})
    file = None if on == "api" else SINGLE
    limit = Fault(on, status=429, headers=headers, file=file, times=2)
    server.repositories["org/model"].fault = limit
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    said: list[str] = []
    assert contents(fetch("org/model", say=said.append))[SINGLE] == weights(0)
    assert waited.count(seconds) == 2 or (on == "resolve" and waited.count(seconds) == 1)
    if on == "api":
        line = f"{server.url} limits the rate of requests; waiting {seconds} s"
        assert said == [line, line]


def test_a_rate_limit_that_does_not_end(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.publish("org/model", {**SMALL, SINGLE: weights(0)})
    repository = server.repositories["org/model"]
    repository.fault = Fault("api", status=429, headers={"Retry-After": "7"})
    assert "answered 429" in failure().message
    assert len(server.requests) == 5
    # Longer than the hub's own windows: it is for the user to wait.
    repository.fault = Fault("api", status=429, headers={"Retry-After": "86400"})
    server.requests.clear()
    assert "answered 429" in failure().message
    assert len(server.requests) == 1


def test_a_wrong_hash(server: HubServer) -> None:
    server.publish("org/model", {**SMALL, **SHARDS, INDEX: index(shard(1), shard(2))})
    server.repositories["org/model"].fault = Fault("resolve", corrupt=True, file=shard(1))
    error = failure()
    assert isinstance(error, CorruptFileError)
    assert f"{shard(1)} of org/model arrived damaged" in error.message
    assert shard(2) not in server.downloads()
    server.repositories["org/model"].fault = None
    assert contents(fetch("org/model", say=silent))[shard(1)] == weights(1)


def test_a_wrong_size(server: HubServer) -> None:
    server.publish("org/model", {**SMALL, SINGLE: weights(0)})
    server.repositories["org/model"].fault = Fault("resolve", extra_size=5, file=SINGLE)
    error = failure()
    assert isinstance(error, CorruptFileError)
    assert f"{SINGLE} of org/model arrived damaged" in error.message
    assert "70005" in error.message


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, f"no space left for {SINGLE} of org/model in the hub cache"),
        (errno.EROFS, "Read-only file system"),
    ],
)
def test_a_disk_that_refuses(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, number: int, expected: str
) -> None:
    server.publish("org/model", {**SMALL, SINGLE: weights(0)})
    download = huggingface_hub.hf_hub_download

    def full(repo_id: str, name: str, **kwargs: Any) -> str:
        if name == SINGLE:
            raise OSError(number, os.strerror(number), "/a/file")
        return download(repo_id, name, **kwargs)

    monkeypatch.setattr(hub_transfer, "hf_hub_download", full)
    error = failure()
    assert type(error) is EnvironmentFailure
    assert expected in error.message
    assert "HF_HOME" in error.hint


def test_a_cache_that_is_no_directory(server: HubServer, cache: Path) -> None:
    server.publish("org/model", {**SMALL, SINGLE: weights(0)})
    cache.write_bytes(b"")
    error = failure()
    assert type(error) is EnvironmentFailure
    assert f"cannot use the hub cache {cache}" in error.message


def test_an_interruption_stays_one(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.publish("org/model", {**SMALL, SINGLE: weights(0)})

    def interrupted(*args: object, **kwargs: object) -> str:
        raise InterruptedConversion("stopped", signal_number=2)

    monkeypatch.setattr(hub_transfer, "hf_hub_download", interrupted)
    with pytest.raises(InterruptedConversion):
        fetch("org/model", say=silent)


def test_progress_counts_what_is_written_also_under_xet() -> None:
    """The protocol by which the client reports, which the server here does not speak."""
    from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

    arrived: list[int] = []
    bar = hub_transfer._bar_for(arrived.append)
    with XetDownloadProgressReporter(
        reconstruction_desc="a file", total=100, log_level=30, tqdm_class=bar
    ) as reporter:
        for written, transferred in ((10, 40), (60, 50), (100, 70)):
            report = SimpleNamespace(
                total_bytes=100,
                total_bytes_completed=written,
                total_transfer_bytes_completed=transferred,
                total_bytes_completion_rate=1.0,
                total_transfer_bytes_completion_rate=1.0,
            )
            reporter.update_progress(report)
    assert arrived == [10, 50, 40]


# As a user's process sees it: the library reads its environment at import

SCRIPT = """
import sys
from loftq_cli.checkpoint.hub import fetch
from loftq_cli.checkpoint.hub_shards import HubSupply
from loftq_cli.errors import LoftqError
try:
    snapshot = fetch(sys.argv[1], say=lambda line: print("said", line))
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
