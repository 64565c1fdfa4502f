"""Several devices that share a conversion: the bytes of one, whoever converts what."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import loftq_cli
from loftq_cli.checkpoint.header import StoredTensor
from loftq_cli.conversion import engine
from loftq_cli.conversion.devices import _Sharing, converted, held
from loftq_cli.errors import EnvironmentFailure, NonFiniteWeightError
from tests.support import checkpoints
from tests.support.bench import Bench
from tests.support.contents import FAST, manifest
from tests.support.stand_in.runtime import stand_in_devices

BOTH = (torch.device("cuda", 0), torch.device("cuda", 1))
SETTINGS: dict[str, Any] = {**FAST, "bits": 2, "method": "nf"}


@pytest.fixture(autouse=True)
def devices() -> Iterator[None]:
    with stand_in_devices(2):
        yield


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.device]:
    """Which device converted which matrix."""
    found: dict[str, torch.device] = {}
    convert = engine.Conversion._convert_matrix

    def seen(self: Any, shard: Any, item: Any, device: torch.device, decomposer: Any) -> Any:
        found[item.tensor.name] = device
        assert torch.cuda.current_device() == device.index
        return convert(self, shard, item, device, decomposer)

    monkeypatch.setattr(engine.Conversion, "_convert_matrix", seen)
    return found


def written(bench: Bench, name: str, **settings: Any) -> dict[str, Any]:
    output = bench.directory / name
    loftq_cli.convert(bench.source, output, **{**SETTINGS, **settings})
    return checkpoints.comparable(output)


@pytest.mark.parametrize("device", ["cuda:0,cuda:1", "cuda:1, cuda:0", "all"])
def test_the_bytes_are_those_of_one_device(
    device: str, bench: Bench, used: dict[str, torch.device]
) -> None:
    expected = written(bench, "one", device="cuda")
    assert {*used.values()} == {BOTH[0]}
    assert written(bench, "both", device=device) == expected
    assert {*used.values()} == {*BOTH}
    devices = [
        manifest(bench.directory / name)["environment"]["device"] for name in ("one", "both")
    ]
    assert devices == [f"{count}a stand-in for a CUDA device" for count in ("", "2 x ")]


def test_each_has_the_statistics_on_it(bench: Bench, used: dict[str, torch.device]) -> None:
    moments = {}
    for name in checkpoints.matrices(checkpoints.llama()):
        columns = 128 if "down_proj" in name else 64
        moments[name] = loftq_cli.Moments(columns, full=True)
        moments[name].add(torch.randn(300, columns).cumsum(dim=1))
    stats = bench.directory / "stats.safetensors"
    loftq_cli.save_statistics(stats, moments)
    expected = written(bench, "one", device="cuda", stats=stats)
    assert written(bench, "both", device="all", stats=stats) == expected
    assert {*used.values()} == {*BOTH}


def test_an_interrupted_conversion_goes_on_with_another_number_of_them(bench: Bench) -> None:
    expected = written(bench, "one", device="cuda")
    convert = engine.Conversion._finish_item
    count = 0

    def interrupted(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == 7:
            raise KeyboardInterrupt
        convert(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Conversion, "_finish_item", interrupted)
        with pytest.raises(KeyboardInterrupt):
            written(bench, "both", device="all")
    assert written(bench, "both", device="cuda:1") == expected


def test_what_one_of_them_finds_is_said_as_ever(bench: Bench) -> None:
    tensors = checkpoints.llama()
    bad = "model.layers.0.mlp.gate_proj.weight"
    tensors[bad][3, 5] = torch.nan
    checkpoints.write(bench.directory / "bad", tensors)
    with pytest.raises(NonFiniteWeightError, match=rf"{bad}.*nan at \[3, 5\]"):
        loftq_cli.convert(bench.directory / "bad", bench.output, device="all", **SETTINGS)
    assert not bench.output.exists()


def test_memory_is_checked_on_each(bench: Bench) -> None:
    with stand_in_devices(2, memory=(1 << 30, 1000)):
        with pytest.raises(EnvironmentFailure, match=r"available \(cuda:1\)"):
            written(bench, "both", device="all")
        assert not list(bench.directory.glob("*both*"))


class Size(int):
    """An item of so many elements."""

    tensor = StoredTensor("a matrix", "F32", (1,), 0)

    @property
    def elements(self) -> int:
        return self


def test_the_largest_of_those_that_were_read_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    call = _Sharing._call
    go = threading.Event()

    def items() -> Iterator[Size]:
        for size in (1, 2, 3, 4, 5, 0, 6, 7):
            if size == 6:
                go.set()  # two devices have two each, and 5 waits
            yield Size(size)

    def recorded(self: Any, item: Size, device: torch.device) -> Any:
        given.append(item)
        return call(self, item, device)

    def convert(size: Size, device: torch.device) -> int:
        assert go.wait(timeout=60)
        return size * 10

    monkeypatch.setattr(_Sharing, "_call", recorded)
    found = dict(converted(items(), BOTH, lambda name: None, convert, 1))
    assert found == {0: None, **{size: size * 10 for size in range(1, 8)}}
    assert given[:5] == [1, 2, 3, 4, 6]
    assert sorted(given) == list(range(1, 8))
    assert held(BOTH) == 8


def test_after_an_error_nothing_begins_and_nothing_that_was_done_is_lost() -> None:
    begun: list[int] = []
    both = threading.Barrier(2)

    def convert(size: Size, device: torch.device) -> int:
        begun.append(size)
        if size in (1, 2):
            both.wait(timeout=60)  # they are converted at the same time
        if size == 1:
            raise ValueError("no")
        return size

    found: list[int] = []
    results = converted(map(Size, range(1, 1000)), BOTH, lambda name: None, convert, 1)
    with pytest.raises(ValueError, match="no"):
        found.extend(size for size, _ in results)
    assert 2 in found
    assert {*begun} == {1, *found}
    assert len(begun) < 999


def test_one_device_needs_no_thread() -> None:
    threads: set[int] = set()

    def convert(size: Size, device: torch.device) -> int:
        threads.add(threading.get_ident())
        return size * 10

    found = converted(map(Size, [3, 0, 1]), BOTH[:1], lambda name: None, convert, 1)
    assert list(found) == [(3, 30), (0, None), (1, 10)]
    assert threads == {threading.get_ident()}
