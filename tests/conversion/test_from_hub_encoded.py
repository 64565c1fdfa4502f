"""A model on a hub that is quantized itself, with scales in other shards than their codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import checkpoints, encoded
from tests.support.hub_conversions import MODEL, Watcher, but_the_manifest, convert, expected
from tests.support.hub_server import HubServer

LAYERS = 3
PER_SHARD = 12


def published(tmp_path: Path) -> dict[str, bytes]:
    """All codes first, then all scales: every scale is in another shard."""
    tensors, stated = encoded.fp8_blocks(checkpoints.llama(layers=LAYERS), (32, 32))
    ordered = dict(sorted(tensors.items(), key=lambda item: item[0].endswith("_scale_inv")))
    cuts = range(PER_SHARD, len(ordered), PER_SHARD)
    config = {**checkpoints.LLAMA, "dtype": "float32", "quantization_config": stated}
    return checkpoints.files(checkpoints.write(tmp_path / "model", ordered, config, list(cuts)))


@pytest.mark.parametrize("settings", [{}, {"target_bpw": 3.0}])
@pytest.mark.parametrize("discard", [False, True])
def test_shards_are_brought_where_scales_are_needed(
    server: HubServer, tmp_path: Path, discard: bool, settings: dict[str, Any]
) -> None:
    files = published(tmp_path)
    server.publish(MODEL, files)
    watcher = Watcher(tmp_path / "cache", tmp_path / ".out.loftq-partial/shards")
    convert(tmp_path / "out", watcher, discard_shards=discard, **settings)
    assert but_the_manifest(tmp_path / "out") == expected(tmp_path, files, **settings)
    assert not (tmp_path / ".out.loftq-partial").exists()
