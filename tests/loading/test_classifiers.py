"""A language model's conversion as a classifier: a new head is trained, saved, loaded, and merged
with the adapter."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import loftq_cli
from loftq_cli.machine.observer import Observer
from loftq_cli.merging.merge import merge

CLASSIFIER = transformers.AutoModelForSequenceClassification
TOKENS = torch.arange(24).view(2, 12) + 3
LABELS = torch.tensor([0, 2])
LAYOUTS: dict[str, dict[str, Any]] = {
    "loftq": {"layout": "loftq"},
    "dense": {"layout": "dense"},
    "bnb": {"layout": "bnb", "bits": 4},
}


def logits(model) -> torch.Tensor:
    """In training mode, without dropout: in evaluation bitsandbytes may compute in bfloat16."""
    with torch.no_grad():
        return model.train()(TOKENS).logits


def trained(model):
    """Three steps, which move the adapter and the head."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(TOKENS, labels=LABELS).loss.backward()
        optimizer.step()
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == {name for name in before if "lora_" in name or "modules_to_save" in name}
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_decoder_becomes_a_classifier(converted, tmp_path, layout) -> None:
    directory = converted("llama", **LAYOUTS[layout])
    start = loftq_cli.load(directory, auto_class=CLASSIFIER, num_labels=3)
    assert type(start.get_base_model()) is transformers.LlamaForSequenceClassification
    assert start.active_peft_config.modules_to_save == ["score"]
    model = trained(start)
    expected = logits(model)
    model.save_pretrained(tmp_path / "trained")
    saved = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in saved

    backbone = CLASSIFIER.from_pretrained(directory, num_labels=3)
    again = peft.PeftModel.from_pretrained(backbone, tmp_path / "trained")
    assert torch.equal(logits(again), expected)

    merge(directory, tmp_path / "merged", adapter=tmp_path / "trained", observer=Observer())
    plain, report = CLASSIFIER.from_pretrained(tmp_path / "merged", output_loading_info=True)
    # The language model's head is still in the checkpoint.
    assert (set(report["missing_keys"]), set(report["unexpected_keys"])) == (
        set(),
        {"lm_head.weight"},
    )
    assert (logits(plain) - expected).abs().max() < 1e-5 * expected.abs().max()
