"""A model with packed layers is copied and pickled as a whole, as one with torch's own layers."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch

import loftq_cli
from loftq_cli.errors import UsageError

# peft asks transformers under a name that transformers is giving up.
ROOT = Path(__file__).parents[2]
TOKENS = torch.arange(12).view(2, 6) + 3
SECOND = {"r": 4, "target_modules": ["q_proj", "up_proj"]}

FRESH = """
import sys
{imported}
import torch
model, tokens, logits = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(model(tokens).logits, logits)
try:
    model.merge_and_unload()
except Exception as error:
    assert "loftq merge" in str(error), error
else:
    raise AssertionError("merged into packed codes")
"""


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


ways = pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_torch])
kinds = pytest.mark.parametrize("embeddings", [False, True], ids=["linear", "embedding"])


@pytest.fixture
def model(converted, embeddings):
    """The llama with its adapter, in evaluation mode; with packed embeddings too."""
    return loftq_cli.load(converted("llama", embeddings=embeddings)).eval()


@ways
@kinds
def test_a_copy_computes_the_same(model, way) -> None:
    assert torch.equal(way(model)(TOKENS).logits, model(TOKENS).logits)


@ways
@pytest.mark.parametrize("embeddings", [True])
def test_a_copy_is_guarded_as_the_model_is(model, way) -> None:
    copied = way(model)
    with pytest.raises(UsageError, match="loftq merge"):
        copied.merge_and_unload()
    with pytest.raises(UsageError, match="init_lora_weights='pissa'"):
        copied.add_adapter("second", peft.LoraConfig(**SECOND, init_lora_weights="pissa"))


@ways
@pytest.mark.parametrize("embeddings", [True])
def test_a_further_adapter_of_a_copy_is_the_copy_s(model, way) -> None:
    before, copied = set(model.state_dict()), way(model)
    copied.add_adapter("second", peft.LoraConfig(**SECOND))
    assert set(model.state_dict()) == before
    added = {name for name in copied.state_dict() if ".second." in name}
    assert len(added) == 2 * 2 * 2  # A and B of two layers in two blocks


@pytest.mark.parametrize("imported", ["import loftq_cli", ""])
@pytest.mark.parametrize("embeddings", [True])
def test_a_saved_model_is_read_in_another_process(model, imported, tmp_path) -> None:
    torch.save((model, TOKENS, model(TOKENS).logits), tmp_path / "model.pt")
    result = subprocess.run(
        [sys.executable, "-c", FRESH.format(imported=imported), tmp_path / "model.pt"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
