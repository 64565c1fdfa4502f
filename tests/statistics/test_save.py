"""Statistics that were measured in a loop of one's own."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

import loftq_cli
from loftq_cli.checkpoint.source import open_source
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.statistics.file import model_sha256, open_statistics


def test_moments_of_ones_own_loop_are_saved_with_the_model(checkpoint, tmp_path):
    directory = checkpoint("llama")
    moments = loftq_cli.Moments(64)
    moments.add(torch.full((4, 64), 3.0))
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    path = tmp_path / "stats.safetensors"
    loftq_cli.save_statistics(path, dict.fromkeys(names, moments), model=directory)
    found = open_statistics(path)
    assert len(set(found.matrices.values())) == 1
    assert set(found.matrices) == set(names)
    assert found.moments(names[1]).tolist() == [9.0] * 64
    assert found.model is not None
    assert found.model.sha256 == model_sha256(open_source(directory))


@pytest.mark.parametrize(
    ("name", "width", "said"),
    [
        ("model.layers.0.self_attn.q_proj", 64, "is not the name of a weight tensor"),
        ("layers.0.self_attn.q_proj.weight", 64, "does not exist"),
        ("model.layers.0.mlp.down_proj.weight", 64, r"has shape \[64, 128\]"),
    ],
)
def test_names_and_widths_that_are_not_the_models_are_refused(
    name, width, said, checkpoint, tmp_path
):
    moments = loftq_cli.Moments(width)
    moments.add(torch.ones(1, width))
    with pytest.raises(UsageError, match=said):
        loftq_cli.save_statistics(
            tmp_path / "stats.safetensors", {name: moments}, model=checkpoint("llama")
        )
    assert os.listdir(tmp_path) == []


def test_nothing_and_zeros_are_not_saved(tmp_path):
    zeros = loftq_cli.Moments(3)
    for moments, said in (
        ({}, "no moments"),
        ({"a.weight": loftq_cli.Moments(3)}, r"a\.weight: no inputs were measured"),
        ({"a.weight": zeros}, r"a\.weight: the inputs are zero"),
    ):
        zeros.add(torch.zeros(2, 3))
        with pytest.raises(LoftqError, match=said):
            loftq_cli.save_statistics(tmp_path / "stats.safetensors", moments)
    assert os.listdir(tmp_path) == []


def test_the_example_of_the_manual_works(checkpoint, tmp_path, monkeypatch):
    manual = (Path(__file__).parents[2] / "docs/python-api.md").read_text("utf-8")
    (code,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", manual, flags=re.DOTALL)
        if "save_statistics" in block
    )
    (tmp_path / "my-model").symlink_to(checkpoint("llama"))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "python-api.md", "exec"), {})
    found = open_statistics("stats.safetensors")
    assert len(found.matrices) == 14
    assert {found.tokens(name) for name in found.matrices} == {5}
    assert found.moments("model.layers.1.mlp.down_proj.weight", in_features=128).dim() == 1
