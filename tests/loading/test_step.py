"""What a training step takes: said from shapes, and counted while it is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import loftq_cli
from tests.support import models, moe
from tests.support.counted import counted

QUICK: dict[str, Any] = {"iters": 1, "threads": 1, "scale": "absmax"}  # B of experts is not 0
WIDE: dict[str, Any] = {"max_position_embeddings": 128}


def made(kind: str, place: Path) -> Path:
    """A model of more like blocks than are looked at, so that the others have to be added."""
    if kind == "llama":
        found = models.llama(128, 256, num_hidden_layers=5, **WIDE)
    elif kind == "bert":
        found = models.bert(128, 256, num_hidden_layers=5, **WIDE)
    elif kind == "bart":
        found = models.bart(128, 256, encoder_layers=4, decoder_layers=5, **WIDE)
    else:
        found = moe.make(kind)
    return models.save(found, place / kind, torch.bfloat16)


# Layouts that gptqmodel loads, which changes its process, are in `make memory-check`.
@pytest.mark.filterwarnings(r"ignore:The following (rank|alpha)_pattern keys.*gate_up_proj")
@pytest.mark.parametrize(
    ("kind", "layout", "bits"),
    [
        ("llama", "loftq", 2),
        ("llama", "dense", 4),
        ("bert", "loftq", 3),
        ("bart", "loftq", 4),
        ("qwen3_moe", "loftq", 4),
    ],
)
def test_what_is_said_is_what_is_counted(kind: str, layout: str, bits: int, tmp_path: Path) -> None:
    source, out = made(kind, tmp_path), tmp_path / "out"
    asked: dict[str, Any] = {"bits": bits, "rank": 4, "layout": layout}
    loftq_cli.convert(source, out, **asked, **QUICK)
    length = 64
    (said,) = loftq_cli.what_fits(source, length=length, batch=2, **asked)["rows"]
    for way in ("", "checkpointed_"):
        found = counted(out, 2, length, checkpointing=bool(way), dtype="bfloat16")
        assert said["adapter_bytes"] == said["gradients_bytes"] == found.adapter
        assert said["optimizer_bytes"] == pytest.approx(found.optimizer, rel=0.01)
        assert said["weights_bytes"] == pytest.approx(found.weights, rel=0.02)
        step = said[f"{way}activations_bytes"] + said["gradients_bytes"]
        uneven = 0.1 if kind == "qwen3_moe" else 0.0  # what a router gives each expert is not known
        assert step == pytest.approx(found.step, rel=0.1 + uneven)
        assert said[f"{way}train_bytes"] == pytest.approx(found.total, rel=0.05 + uneven)


def test_longer_windows_and_more_of_them_take_more(tmp_path: Path) -> None:
    source = made("llama", tmp_path)
    asked: dict[str, Any] = {"bits": 2, "rank": 4, "layout": "loftq"}
    taken = [
        loftq_cli.what_fits(source, length=length, batch=batch, **asked)["rows"][0]
        for length, batch in ((32, 1), (64, 1), (32, 2))
    ]
    first, longer, more = (each["activations_bytes"] for each in taken)
    assert more == pytest.approx(2 * first, rel=0.1)
    assert longer == pytest.approx(2 * first, rel=0.1)
    assert all(each["checkpointed_activations_bytes"] < each["activations_bytes"] for each in taken)
