"""A model's whole way on a device: measured, converted, refined, loaded, trained and merged, each
with the values of the CPU's tensor operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loftq_cli
from loftq_cli.kernels import native
from loftq_cli.numerics import lowrank, metrics
from tests.support import models
from tests.support.calibrated import LENGTH, TEXT
from tests.support.stand_in.runtime import stand_in_devices
from tests.support.steps import train

SETTINGS: dict[str, Any] = {"bits": 2, "method": "nf", "rank": 4, "iters": 1, "threads": 1}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model and a text."""
    models.save_tokenizer(models.save(models.llama(num_hidden_layers=1), tmp_path / "model"))
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def all_the_way(place: Path, device: str, name: str) -> dict[str, Any]:
    """Everything that is done with a model, on ``device``; figures that are measured on the way.
    What is written lies in the folder of this ``name``."""
    model, text, to = place / "model", place / "text.txt", place / name
    to.mkdir()
    asked: dict[str, Any] = {"length": LENGTH, "samples": 8, "device": device}
    loftq_cli.calibrate(model, text, to / "stats.safetensors", moments="full", **asked)
    loftq_cli.convert(model, to / "out", stats=to / "stats.safetensors", device=device, **SETTINGS)
    loftq_cli.refine(to / "out", to / "refined", source=model, text=text, epochs=1, **asked)
    found = loftq_cli.evaluate(to / "refined", text=text, source=model, **asked)
    trained = loftq_cli.load(to / "refined").to(device)
    losses = train(trained.train(), torch.device(device), steps=2)
    trained.save_pretrained(to / "trained")
    loftq_cli.merge(to / "refined", to / "merged", adapter=to / "trained")
    return {"losses": losses, **{each: found[each] for each in ("perplexity", "kl", "top1")}}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.relative_to(directory)}: {name}": tensor
        for file in sorted(directory.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def test_every_step_gives_the_values_of_the_tensor_path(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bfloat16 = lowrank.fastest_products(torch.device("cpu")) == torch.bfloat16
    with monkeypatch.context() as patch:
        patch.setattr(native, "available", lambda: False)
        patch.setattr(metrics, "_at_once", lambda rows: True)
        here = all_the_way(place, "cpu", "here")  # first: what it imports must see no device
    with stand_in_devices(bfloat16=bfloat16) as tally:
        there = all_the_way(place, "cuda", "there")
        assert sum(tally.launches.values()) > 1000
    assert there == here
    found, expected = tensors(place / "there"), tensors(place / "here")
    assert found.keys() == expected.keys()
    different = {name for name, value in found.items() if not torch.equal(value, expected[name])}
    assert different == set()
