"""A model on a hub, converted where there is less disk than the model takes, and killed twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import loftq_cli
from tests.support import checkpoints
from tests.support.hub_server import Fault, HubServer
from tests.whole.crash.stress import STRESS, tell

HIDDEN, INTERMEDIATE, LAYERS = (1024, 2816, 6) if STRESS else (256, 1024, 6)
SETTINGS: dict[str, Any] = {"bits": 2, "rank": 4, "iters": 2, "threads": 1}
OPTIONS = ("--bits", "2", "--rank", "4", "--iters", "2", "-t", "1", "--discard-shards")
MATRICES = 7 * LAYERS


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Llama with a shard for every layer: 25 MB in six shards, or 310 MB."""
    tensors = checkpoints.llama(HIDDEN, INTERMEDIATE, LAYERS)
    return checkpoints.write(tmp_path / "model", tensors, cuts=range(9, 8 * LAYERS, 8))


@pytest.fixture
def disk(tmp_path: Path, model: Path) -> Iterator[Path]:
    """A place for cache and output: a file system of two thirds of the model's size where one may
    be mounted. That no more is taken is measured besides."""
    place = tmp_path / "disk"
    place.mkdir()
    size = taken(model) * 2 // 3
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    yield place
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def taken(directory: Path) -> int:
    """Bytes on disk below ``directory``, holes not counted."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except FileNotFoundError:
                continue  # it was deleted meanwhile
    return total


class Peak:
    """The most that a directory took while the block ran."""

    def __init__(self, directory: Path) -> None:
        self.bytes = 0
        self._directory = directory
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._measure)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _measure(self) -> None:
        while not self._over.wait(0.005):
            self.bytes = max(self.bytes, taken(self._directory))


def journaled(disk: Path) -> int:
    """How many matrices are finished."""
    try:
        return (disk / ".out.loftq-partial/journal").read_text().count('"frobenius"')
    except FileNotFoundError:
        return 0


def test_less_disk_than_the_model_and_killed_twice(model: Path, disk: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    with HubServer(tmp_path / "hub") as hub:
        commit = hub.publish("org/model", checkpoints.files(model))
        # Slow enough that a kill meets a download.
        hub.repositories["org/model"].fault = Fault("resolve", delay=0.0005)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_HOME": str(disk / "home"),
            "HF_ENDPOINT": hub.url,
            "NO_PROXY": "127.0.0.1",
        }
        arguments = ["convert", "org/model", "-o", str(disk / "out"), *OPTIONS]

        def run(until: Callable[[], bool]) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-m", "loftq_cli", *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            while process.poll() is None and not until():
                time.sleep(0.005)
            return process

        def killed(until: Callable[[], bool]) -> None:
            process = run(until)
            process.send_signal(signal.SIGKILL)
            said = process.communicate()
            assert process.returncode == -signal.SIGKILL, said

        with Peak(disk) as peak:
            killed(lambda: journaled(disk) >= 3)
            first = journaled(disk)
            hub.publish("org/model", {"config.json": b"{}"})  # the branch moves on
            killed(lambda: journaled(disk) >= max(first + 1, MATRICES // 2))
            assert first < journaled(disk) < MATRICES
            process = run(lambda: False)
            _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "resuming the unfinished conversion" in stderr
    assert f"goes on with {commit}" in stderr
    assert peak.bytes < taken(model) * 2 / 3
    assert not list((disk / "home").rglob("*.safetensors"))
    loftq_cli.convert(model, tmp_path / "local", **SETTINGS)
    name = "loftq_manifest.json"
    found, expected = checkpoints.files(disk / "out"), checkpoints.files(tmp_path / "local")
    assert found.pop(name) != expected.pop(name)
    assert found == expected
    tell(
        f"{taken(model) / 1e6:.0f} MB of model from the hub, killed twice: at most "
        f"{peak.bytes / 1e6:.0f} MB of disk, {time.monotonic() - began:.0f} s"
    )
