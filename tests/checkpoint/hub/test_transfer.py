"""Bytes on their way from the hub: dropped connections, rate limits, damage, full disks."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from loftq_cli.checkpoint.hub import transfer as hub_transfer
from loftq_cli.errors import CorruptFileError, EnvironmentFailure, InterruptedConversion
from tests.support.hub_fixtures import hurry
from tests.support.hub_models import (
    INDEX,
    SHARDS,
    SINGLE,
    SMALL,
    contents,
    failure,
    fetch,
    index,
    shard,
    silent,
    weights,
)
from tests.support.hub_server import Fault, HubServer


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
    hurry(monkeypatch, waited.append)
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
