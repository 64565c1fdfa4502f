"""Shards are brought one ahead of what is worked on, and given up with it."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loftq_cli.checkpoint.deliveries import Deliveries, deliver_all
from loftq_cli.checkpoint.supply import Progress, Supply
from loftq_cli.errors import DownloadAbandoned, EnvironmentFailure
from loftq_cli.machine.observer import Observer

SOON = 30  # seconds: the end of a test that would otherwise hang


class Slow(Supply):
    """Brings a shard when it is let; keeps what was asked for, in order."""

    def __init__(self) -> None:
        super().__init__(Path("nowhere"))
        self.asked: list[str] = []
        self.released: list[str] = []
        self.begun = {name: threading.Event() for name in "abc"}
        self.let = {name: threading.Event() for name in "abc"}
        self.ended: dict[str, BaseException | None] = {}
        self.broken: str | None = None

    def ensure(self, name: str, progress: Progress | None = None) -> None:
        assert progress is not None
        self.asked.append(name)
        self.begun[name].set()
        try:
            if name == self.broken:
                raise EnvironmentFailure("no network")
            while not self.let[name].wait(0.01):
                progress(1)
            progress(1)
        except BaseException as error:
            self.ended[name] = error
            raise
        self.ended[name] = None

    def release(self, name: str) -> None:
        self.released.append(name)


def deliveries(supply: Supply) -> Deliveries:
    source: Any = SimpleNamespace(supply=supply)
    return Deliveries(source, ["a", "b", "c"], Observer())


def test_the_next_one_comes_while_one_is_worked_on() -> None:
    supply = Slow()
    with deliveries(supply) as found:
        supply.let["a"].set()
        found.take("a")
        assert supply.begun["b"].wait(SOON)
        supply.let["b"].set()
        supply.let["c"].set()
        assert supply.asked == ["a", "b"]  # the one behind it waits until it is its turn
        found.done("a")
        found.take("b")
        assert supply.begun["c"].wait(SOON)
        found.take("c")
    assert supply.asked == ["a", "b", "c"]
    assert supply.released == ["a"]


def test_what_cannot_be_brought_is_told_when_its_turn_comes() -> None:
    supply = Slow()
    supply.broken = "b"
    supply.let["a"].set()
    with deliveries(supply) as found:
        found.take("a")
        assert supply.begun["b"].wait(SOON)
        with pytest.raises(EnvironmentFailure, match="no network"):
            found.take("b")
    assert "c" not in supply.asked


def test_an_error_ends_the_download_that_is_under_way() -> None:
    supply = Slow()
    supply.let["a"].set()

    def interrupted() -> None:
        with deliveries(supply) as found:
            found.take("a")
            assert supply.begun["b"].wait(SOON)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert isinstance(supply.ended["b"], DownloadAbandoned)


def test_one_that_was_not_expected_is_brought_all_the_same() -> None:
    supply = Slow()
    for event in supply.let.values():
        event.set()
    source: Any = SimpleNamespace(supply=supply)
    with Deliveries(source, ["b"], Observer()) as found:
        found.take("a")
        found.take("b")
    assert supply.asked == ["a", "b"]


def test_all_of_them_where_a_model_is_needed_as_a_whole() -> None:
    supply = Slow()
    for event in supply.let.values():
        event.set()
    source: Any = SimpleNamespace(supply=supply, shards=[SimpleNamespace(name=n) for n in "abc"])
    deliver_all(source, Observer())
    assert supply.ended == {"a": None, "b": None, "c": None}
    assert supply.released == []
