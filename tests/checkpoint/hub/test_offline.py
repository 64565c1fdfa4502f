"""Without a connection the hub cache is used, and what is missing there is listed."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from loftq_cli.errors import EnvironmentFailure
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
