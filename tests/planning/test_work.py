"""What tensors take, relative to one another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loftq_cli.checkpoint.source import open_source
from loftq_cli.planning.make import make_plan
from loftq_cli.planning.work import work
from loftq_cli.settings.options import Options
from tests.support import checkpoints


def works(path: Path, **options: object) -> dict[str, int]:
    plan = make_plan(open_source(path), Options(threads=1, **options).resolve())
    return {tensor.name: work(plan, tensor) for tensor in plan.source.tensors}


def test_what_is_converted_takes_longer_than_what_is_copied(tmp_path: Path) -> None:
    model = checkpoints.write(tmp_path / "model", checkpoints.llama())
    name, kept = "model.layers.0.mlp.up_proj.weight", "lm_head.weight"
    plain = works(model, bits=4)
    assert plain[kept] == 24 * 64 * 4  # a nanosecond for a byte
    assert plain[name] > 10 * plain["model.norm.weight"]
    twice = works(model, bits=4, iters=10)
    assert 1.5 < twice[name] / plain[name] < 2
    assert works(model, bits=4, rank=64)[name] > plain[name] > works(model, bits=4, iters=0)[name]
    assert 2 < works(model, bits=4, method="fitted")[name] / plain[name] < 4


def test_a_matrix_takes_what_its_elements_take(tmp_path: Path) -> None:
    names = ("model.layers.0.mlp.a.weight", "model.layers.0.mlp.b.weight")
    tensors = {names[0]: torch.randn(64, 64), names[1]: torch.randn(192, 64)}
    found = works(checkpoints.write(tmp_path / "model", tensors), bits=2)
    assert found[names[1]] == pytest.approx(3 * found[names[0]])
