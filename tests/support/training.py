"""Adapters that PEFT trained for a few steps, and what their models compute."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoConfig

# No dropout, for logits that are the same every time.
STEADY: dict[str, dict[str, Any]] = {
    "llama": {},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "bart": {"dropout": 0.0},
}
TOKENS = torch.arange(1, 25).view(2, 12) % 96


def train(model: Any, steps: int = 3) -> Any:
    """A few optimizer steps on whatever is trainable; every trained tensor moves."""
    torch.manual_seed(0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=TOKENS)[0].float().square().mean().backward()
        optimizer.step()
    return model


def continued(base: Any, output: Path) -> Any:
    """``base`` with the adapter that the conversion in ``output`` made, trained."""
    return train(
        peft.PeftModel.from_pretrained(base, output, subfolder="loftq_init", is_trainable=True)
    )


def begun(base: Any, **config: Any) -> Any:
    """``base`` with an adapter of its own, of this LoraConfig, trained."""
    config = copy.deepcopy(config)  # PEFT changes the lists that it is given
    return train(peft.get_peft_model(base, peft.LoraConfig(**config)))


def logits(model: Any) -> torch.Tensor:
    """The first output for a fixed input. In training mode, without dropout: in evaluation
    bitsandbytes multiplies in bfloat16 where the processor can."""
    with torch.no_grad():
        return model.train()(input_ids=TOKENS)[0].float()


def load(model_class: Any, directory: Path, **options: Any) -> Any:
    """The model in ``directory``, of which no key is missing or unexpected."""
    assert not hasattr(AutoConfig.from_pretrained(directory), "quantization_config")
    model, info = model_class.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model
