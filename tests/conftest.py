"""Signals as in a terminal, tests that do not disturb each other, which of them are slow, and no
deadline for an example that hypothesis draws, as a machine may be busy: the same ones in every run.

A shell starts what it puts in the background with SIGINT ignored, and the commands that are tested
would inherit that.
"""

from __future__ import annotations

import signal
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.slow import is_slow
from tests.support.state import restored

signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_slow(item.path):
            item.add_marker(pytest.mark.slow)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Of what is not to run, not even the imports, which take longer than many a test."""
    if config.option.markexpr == "not slow" and is_slow(collection_path):
        return True
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Around its fixtures, too, those of a session included."""
    with restored():
        return (yield)
