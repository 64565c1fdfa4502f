"""A little LoRA training: one window a step."""

from __future__ import annotations

import random
from typing import Any

import torch

from tests.benchmarks.tools import warmed_cosine


def train(model: Any, windows: torch.Tensor, steps: int, rate: float) -> list[float]:
    """Train the parameters of ``model`` that are to be, on int64 (windows, length) in an order that
    is the same for every start; the losses. In bfloat16 autocast."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    order = random.Random(0).sample(range(len(windows)), steps)
    losses = []
    model.train()
    for step, at in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = rate * warmed_cosine(step / steps)
        window = windows[at : at + 1]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=window, labels=window).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses
