"""Models to publish on a hub, and how they are fetched."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from loftq_cli.checkpoint.hub import repository as hub
from loftq_cli.checkpoint.hub.listing import HubSnapshot
from loftq_cli.checkpoint.hub.shards import HubSupply
from loftq_cli.checkpoint.request import Request
from loftq_cli.errors import LoftqError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SMALL = {
    "config.json": b'{"model_type": "llama"}\n',
    "tokenizer.json": bytes(range(256)) * 40,
    "LICENSE.txt": b"a licence\n",
}
UNWANTED = {
    "README.md": b"a model card\n",
    "modeling_llama.py": b"raise SystemExit\n",
    "LICENSE_model.py": b"raise SystemExit\n",
    "pytorch_model.bin": b"a pickle\n",
    "onnx/config.json": b"{}\n",
}
META = {
    "consolidated.00.pth": b"a pickle\n",
    "params.json": b"{}\n",
    "tokenizer.model": b"a tokenizer\n",
}


def shard(number: int) -> str:
    return f"model-{number:05}-of-00002.safetensors"


def weights(seed: int) -> bytes:
    """A safetensors file of 70,000 bytes."""
    entry = {"dtype": "U8", "shape": [69_900], "data_offsets": [0, 69_900]}
    header = json.dumps({"w": entry}).encode().ljust(92)
    data = bytes((seed + i * i) % 251 for i in range(69_900))
    return len(header).to_bytes(8, "little") + header + data


SHARDS = {shard(1): weights(1), shard(2): weights(2)}


def index(*names: object) -> bytes:
    return json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(names)}}).encode()


def fetch(
    repo_id: str, revision: str | None = None, *, say: Callable[[str], None], **options: Any
) -> HubSnapshot:
    """The whole model: its small files, then each of its shards."""
    snapshot = hub.fetch(Request(repo_id, revision, **options), say)
    supply = HubSupply(snapshot)
    for name in snapshot.shards:
        assert supply.header(name).size == snapshot.shards[name].size
        supply.ensure(name, lambda nbytes: None)
    return snapshot


def silent(line: str) -> None:
    raise AssertionError(f"said: {line}")


def contents(snapshot: HubSnapshot) -> dict[str, bytes]:
    root = snapshot.directory
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def failure(repo_id: str = "org/model", revision: str | None = None, **kwargs: bool) -> LoftqError:
    """The error of a fetch that fails; that it is one printable line is checked here."""
    with pytest.raises(LoftqError) as caught:
        fetch(repo_id, revision, say=lambda line: None, **kwargs)
    assert str(caught.value).isprintable()
    assert caught.value.hint
    return caught.value
