"""A hub on 127.0.0.1 for the client in this process, with a cache of its own."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from time import sleep as pause  # itself, whatever tests put in its place

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.support.hub_server import HubServer


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, no token, no proxy, no waiting between the library's retries."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hurry(monkeypatch)
    return tmp_path / "cache"


def hurry(
    monkeypatch: pytest.MonkeyPatch, note: Callable[[float], object] = lambda seconds: None
) -> None:
    """Have ``note`` called instead of the hub's client and ours waiting. Others wait as ever: a
    thread in the background that does not, as a library's that refreshes bars, never lets go."""

    def sleep(seconds: float) -> None:
        caller = str(sys._getframe(1).f_globals.get("__name__"))
        waits = note if caller.startswith(("huggingface_hub", "loftq_cli")) else pause
        waits(seconds)

    monkeypatch.setattr(time, "sleep", sleep)


@pytest.fixture
def server(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as running:
        use_endpoint(monkeypatch, running.url)
        yield running
        huggingface_hub.close_session()


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address at which nobody listens, and nobody else can while it is taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
