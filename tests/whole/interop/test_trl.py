"""TRL trains what ``load()`` returns: supervised, and by preference against the start."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import loftq_cli
from tests.support import models

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

TEXTS = ["the mill stood still for years", "nobody used the mill for a long time"] * 4
QUIET: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}


@pytest.fixture(scope="module", params=["loftq", "compressed"])
def output(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trl")
    source = models.save_tokenizer(models.save(models.llama(), place / "source"))
    settings: dict[str, Any] = {"bits": 2, "method": "uniform", "block_size": 32, "rank": 4}
    loftq_cli.convert(source, place / "out", layout=request.param, threads=1, **settings)
    return place / "out"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(12)[None]).logits


def trained(trainer: Any, place: Path) -> list[float]:
    """The losses; the adapter is saved in ``place``."""
    trainer.train()
    trainer.save_model(str(place))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_supervised_fine_tuning(output: Path, tmp_path: Path) -> None:
    model, tokenizer = loftq_cli.load(output), AutoTokenizer.from_pretrained(output)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path / "work"), **QUIET),
        train_dataset=datasets.Dataset.from_list([{"text": text} for text in TEXTS]),
        processing_class=tokenizer,
    )
    losses = trained(trainer, tmp_path / "trained")
    assert losses[-1] < losses[0]
    again = loftq_cli.load(output, adapter=tmp_path / "trained")
    assert torch.equal(logits(again), logits(model))


def test_preferences_are_measured_against_the_start(output: Path, tmp_path: Path) -> None:
    """The first loss is log 2, as policy and reference are the same: Q with its adapter, and not Q
    alone, which is a damaged model."""
    model, tokenizer = loftq_cli.load(output), AutoTokenizer.from_pretrained(output)
    pairs = [
        {"prompt": "the mill", "chosen": " stood still", "rejected": " ran for years"}
        for _ in TEXTS
    ]
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(output_dir=str(tmp_path / "work"), **QUIET),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    with model.disable_adapter():
        alone = logits(model)
    assert (alone - logits(model)).abs().max() > 1e-3
    losses = trained(trainer, tmp_path / "trained")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < losses[0]
    again = loftq_cli.load(output, adapter=tmp_path / "trained")
    model.set_adapter("default")
    assert torch.equal(logits(again), logits(model))
