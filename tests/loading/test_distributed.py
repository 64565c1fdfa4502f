"""Two processes compute the gradients of one, with DDP and with FSDP2 (gloo, on the CPU)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loftq_cli
from tests.support import ranks

# peft asks transformers under a name that transformers is giving up.
ROOT = Path(__file__).parents[2]
SETTINGS: list[dict[str, Any]] = [
    {"method": "nf"},
    {"method": "uniform", "bits": 2, "scale_dtype": "int8"},
]


@pytest.fixture(scope="module")
def computed(
    converted: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """``computed(number, way, rank)``: what a process found for the conversion of this number."""
    work = tmp_path_factory.mktemp("ranks")
    directories = [str(converted("llama", **settings)) for settings in SETTINGS]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, ranks.__file__, str(work), *directories]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return lambda number, way, rank: torch.load(work / f"{number}-{way}-{rank}.pt")


@pytest.mark.parametrize("way", ranks.WAYS)
@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_two_processes_compute_the_gradients_of_one(converted, computed, number, way) -> None:
    model = loftq_cli.load(converted("llama", **SETTINGS[number]))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = ranks.gradients(model, ranks.TOKENS)
    for rank in range(ranks.RANKS):
        found = computed(number, way, rank)
        assert found["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.any()
            torch.testing.assert_close(found["gradients"][name], gradient)
        # What every process holds, or a part of, is still what was stored.
        assert found["state"].keys() == state.keys()
        for name, tensor in state.items():
            assert found["state"][name].dtype == tensor.dtype, name
            assert torch.equal(found["state"][name], tensor), name
