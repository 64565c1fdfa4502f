"""A conversion on a device: the bytes of the CPU's tensor operations, whatever the layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import loftq_cli
from loftq_cli.kernels import native
from loftq_cli.numerics import lowrank, metrics
from tests.support import checkpoints
from tests.support.bench import Bench
from tests.support.contents import FAST, manifest
from tests.support.stand_in.runtime import stand_in_devices

LAYOUTS: dict[str, dict[str, Any]] = {
    "bnb": {"bits": 4},
    "gptq": {"bits": 3},
    "compressed": {"bits": 4, "method": "uniform-symmetric"},
    "awq": {"bits": 4},
    "dense": {"bits": 2, "dense_dtype": "bfloat16"},
    "loftq": {"bits": 2, "method": "nf", "scale_dtype": "int8", "embeddings": True},
}


def on_the_cpu(bench: Bench, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, Any]:
    with monkeypatch.context() as patch:
        patch.setattr(native, "available", lambda: False)
        patch.setattr(metrics, "_at_once", lambda rows: True)
        output = bench.directory / "on-the-cpu"
        loftq_cli.convert(bench.source, output, device="cpu", **{**FAST, **settings})
    return alike(output)


def alike(output: Any) -> dict[str, Any]:
    """What has to be the same on every device: all but its name in the recipe."""
    found = checkpoints.comparable(output)
    recorded = found["loftq_manifest.json"]
    del recorded["recipe"]["device"], recorded["fingerprint"]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_has_the_bytes_of_the_tensor_path(
    layout: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"layout": layout, **LAYOUTS[layout]}
    expected = on_the_cpu(bench, monkeypatch, **settings)
    bfloat16 = lowrank.fastest_products(torch.device("cpu")) == torch.bfloat16
    with stand_in_devices(bfloat16=bfloat16) as tally:
        loftq_cli.convert(bench.source, bench.output, device="cuda", **{**FAST, **settings})
        assert sum(tally.launches.values()) > 100
    assert alike(bench.output) == expected
    assert manifest(bench.output)["environment"]["device"] == "a stand-in for a CUDA device"
