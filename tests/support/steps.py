"""A few steps of training."""

from __future__ import annotations

from typing import Any

import torch


def train(model: Any, device: torch.device, steps: int) -> list[float]:
    """So many steps of AdamW on ``device``, on two rows of tokens; their losses."""
    ids = (torch.arange(1, 25).view(2, 12) % 96).to(device)
    wanted = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=1e-2, foreach=False)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
