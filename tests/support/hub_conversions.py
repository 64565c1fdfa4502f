"""A small Llama on a hub on 127.0.0.1, and conversions of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import loftq_cli
from loftq_cli.checkpoint.request import Request
from loftq_cli.conversion.prepare import prepare
from loftq_cli.conversion.run import Outcome, run
from loftq_cli.settings.options import Options
from tests.support import checkpoints
from tests.support.bench import MANIFEST, Recorder
from tests.support.hub_server import HubServer

MODEL = "org/model"
LAST = "model.layers.3.mlp.down_proj.weight"


def shard(number: int) -> str:
    return f"model-{number:05}-of-00004.safetensors"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """A small Llama in four shards."""
    tensors = checkpoints.llama(layers=4)
    return checkpoints.files(checkpoints.write(tmp_path / "model", tensors, cuts=(9, 17, 25)))


@pytest.fixture
def commit(server: HubServer, files: dict[str, bytes]) -> str:
    return server.publish(MODEL, files)


def plan_of(output: Path, recorder: Recorder | None = None, **options: Any) -> Any:
    chosen: dict[str, Any] = {
        name: options.pop(name) for name in ("bits", "target_bpw") if name in options
    }
    settings = Options(**{"threads": 1, "rank": 4, "iters": 2, **chosen})
    asked = {name: options.pop(name) for name in ("revision", "offline") if name in options}
    request = Request(MODEL, **asked)
    return prepare(request, output, settings, observer=recorder or Recorder(), **options)


def convert(output: Path, recorder: Recorder | None = None, **options: Any) -> Outcome:
    recorder = recorder or Recorder()
    plan, path = plan_of(output, recorder, **options)
    return run(plan, path, overwrite=options.get("overwrite", False), observer=recorder)


def expected(tmp_path: Path, files: dict[str, bytes], **settings: Any) -> dict[str, bytes]:
    """What a conversion of the same files from a directory gives, but for the manifest."""
    key = str((files, settings))
    if key not in _EXPECTED:
        source = tmp_path / "expected-model"
        source.mkdir()
        for name, content in files.items():
            (source / name).write_bytes(content)
        output = tmp_path / "expected"
        loftq_cli.convert(source, output, threads=1, rank=4, iters=2, **settings)
        _EXPECTED[key] = but_the_manifest(output)
    return _EXPECTED[key]


_EXPECTED: dict[str, dict[str, bytes]] = {}


def but_the_manifest(output: Path) -> dict[str, bytes]:
    return {name: data for name, data in checkpoints.files(output).items() if name != MANIFEST}


def weights_in(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*.safetensors")}


class Watcher(Recorder):
    """Notes which shards of the source lie on the disk whenever a tensor is begun."""

    def __init__(self, *places: Path, stop_before: str | None = None) -> None:
        super().__init__(stop_before)
        self.places = places
        self.seen: list[set[str]] = []
        self.total = 0
        self.arrived = 0

    def working_on(self, name: str) -> None:
        self.seen.append(set().union(*(weights_in(place) for place in self.places)))
        super().working_on(name)

    def begin_download(self, total_bytes: int) -> None:
        self.total = total_bytes

    def downloaded(self, nbytes: int) -> None:
        self.arrived += nbytes
