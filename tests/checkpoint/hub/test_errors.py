"""What the hub refuses, and a network that is not there: what is said of it."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from loftq_cli.checkpoint.hub.listing import looks_like_hub_id
from loftq_cli.errors import EnvironmentFailure, SourceNotFoundError
from tests.support.hub_fixtures import use_endpoint
from tests.support.hub_models import SINGLE, SMALL, failure, weights
from tests.support.hub_server import Fault, HubServer


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


@pytest.mark.parametrize("url", [None, "http://no-such-host.invalid", "nonsense"])
def test_no_network(
    cache: Path, monkeypatch: pytest.MonkeyPatch, nobody: str, url: str | None
) -> None:
    url = url or nobody
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
