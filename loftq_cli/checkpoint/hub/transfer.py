"""Bytes from the hub: whole files through huggingface_hub's downloads, headers by range."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
    tqdm,
)

from loftq_cli.checkpoint.header import Header, json_length, parse_header
from loftq_cli.checkpoint.hub.errors import explained
from loftq_cli.checkpoint.supply import Progress
from loftq_cli.errors import LoftqError

_FIRST = 100_000  # bytes asked for at first; nearly all headers fit
_TRIES = 5  # in a row that bring nothing


def download(
    repo_id: str,
    revision: str,
    name: str,
    *,
    into: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """A file's path in the hub cache, or in the directory ``into``, downloaded if it is not
    there. Without ``progress`` the library shows its own bar.

    Raises EnvironmentFailure (access, network, disk), CorruptFileError (a wrong size).
    """
    with explained(repo_id, revision, name, place=into):
        bar = None if progress is None else _bar_for(progress)
        return Path(
            hf_hub_download(repo_id, name, revision=revision, local_dir=into, tqdm_class=bar)
        )


def read_remote_header(repo_id: str, commit: str, name: str, size: int) -> Header:
    """The checked header of a safetensors file of ``size`` bytes, without the rest of it.

    Raises HeaderError, EnvironmentFailure (access, network).
    """
    url = hf_hub_url(repo_id, name, revision=commit)
    body = bytearray()
    with explained(repo_id, commit, name):
        _read_up_to(url, min(_FIRST, size), body)
    end = 8 + json_length(bytes(body[:8]), size)
    with explained(repo_id, commit, name):
        _read_up_to(url, end, body)
    return parse_header(bytes(body[:8]), bytes(body[8:end]), size)


def _read_up_to(url: str, end: int, body: bytearray) -> None:
    """Extend ``body``, the file's first bytes, to its first ``end`` bytes, whatever the connection
    does, as long as something arrives. A server that is asked for a range may send the whole
    file, of which no more than that is read."""
    failures = 0
    while len(body) < end:
        before = len(body)
        try:
            _receive(url, end, body)
            if len(body) == before:
                raise EOFError("the answer is empty")
        except (HfHubHTTPError, LoftqError):
            raise
        except Exception:
            failures = failures + 1 if len(body) == before else 0
            if failures == _TRIES:
                raise
            time.sleep(1)


def _receive(url: str, end: int, body: bytearray) -> None:
    start = len(body)
    headers = {
        **build_hf_headers(),
        "Range": f"bytes={start}-{end - 1}",
        "Accept-Encoding": "identity",
    }
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    # What breaks in the middle of the body cannot be tried again in there: see _read_up_to.
    with http_stream_backoff(
        "GET", url, headers=headers, timeout=timeout, retry_on_exceptions=()
    ) as response:
        hf_raise_for_status(response)
        skipped = start if response.status_code == 200 else 0
        for piece in response.iter_bytes():
            body += piece[skipped:]
            skipped = max(skipped - len(piece), 0)
            if len(body) >= end:
                del body[end:]
                return


def _bar_for(progress: Progress) -> type[tqdm]:
    """A progress bar, as the library's downloads want one, that shows nothing itself."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            progress(int(n or 0))

        # With these two the client makes one bar of a file under xet, and not a second one that
        # counts what is on the wire.
        def update_transfer(self, n: float) -> None:
            pass

        def set_transfer_postfix_str(self, *args: Any, **kwargs: Any) -> None:
            pass

    return Bar
