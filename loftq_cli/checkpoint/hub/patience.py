"""Waiting if the hub limits the rate of requests.

huggingface_hub waits by itself while it downloads and uploads, but not while it lists.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

_TRIES = 5
_LONGEST = 900  # seconds; the hub counts in windows of 300

_Answer = TypeVar("_Answer")


def patiently(ask: Callable[[], _Answer], say: Callable[[str], None]) -> _Answer:
    """The answer of ``ask``, asked again after as long as the hub's headers say. Raises what
    ``ask`` raises, a refusal for the rate too if the hub does not say how long it lasts."""
    for _ in range(_TRIES - 1):
        try:
            return ask()
        except HfHubHTTPError as error:
            seconds = _seconds(error)
            if seconds is None or seconds > _LONGEST:
                raise
            say(f"{constants.ENDPOINT} limits the rate of requests; waiting {seconds} s")
            time.sleep(seconds)
    return ask()


def _seconds(error: HfHubHTTPError) -> int | None:
    """How long to wait, rounded up."""
    if error.response.status_code != 429:
        return None
    limit = parse_ratelimit_headers(error.response.headers)
    if limit is not None and limit.remaining == 0:
        return int(limit.reset_in_seconds) + 1
    after = error.response.headers.get("Retry-After", "").strip()
    return int(after) + 1 if after.isdecimal() else None
