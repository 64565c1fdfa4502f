"""Training that was stopped goes on from a checkpoint of transformers.Trainer as if it had not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import loftq_cli

GENERATOR = torch.Generator().manual_seed(0)
ROWS = [
    {"input_ids": row, "labels": row} for row in torch.randint(3, 90, (8, 12), generator=GENERATOR)
]


def trained(directory: Path, work: Path, resume: str | None = None) -> tuple[Any, list[float]]:
    """(the model of ``directory`` after step 4, the losses of the steps that led to it)."""
    model = loftq_cli.load(directory)
    arguments = transformers.TrainingArguments(
        work,
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        logging_steps=1,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=resume)
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("layout", ["loftq", "dense"])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(converted, tmp_path, layout) -> None:
    directory = converted("llama", layout=layout)
    model, losses = trained(directory, tmp_path / "work")
    start = loftq_cli.load(directory).state_dict()
    again, resumed = trained(directory, tmp_path / "again", str(tmp_path / "work/checkpoint-2"))
    # The resumed run began after step 2.
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["checkpoint-4"]
    assert len(set(losses)) == 4
    assert resumed == losses
    expected, found = model.state_dict(), again.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, start[name])}
    assert changed == {name for name in found if "lora_" in name}
