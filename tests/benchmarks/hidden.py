"""What a BERT makes of sentences: last hidden states, and their means."""

from __future__ import annotations

from typing import Any

import torch

_BATCH = 64


def batches(tokenizer: Any, texts: list[str]) -> list[Any]:
    return [
        tokenizer(texts[at : at + _BATCH], padding=True, return_tensors="pt")
        for at in range(0, len(texts), _BATCH)
    ]


@torch.inference_mode()
def hidden_states(model: Any, given: list[Any]) -> torch.Tensor:
    """(tokens, hidden) of all sentences, padding left out."""
    return torch.cat(
        [model(**batch).last_hidden_state[batch["attention_mask"].bool()] for batch in given]
    )


@torch.inference_mode()
def embeddings(model: Any, given: list[Any]) -> torch.Tensor:
    """(sentences, hidden): the mean of the last hidden states of each sentence."""
    parts = []
    for batch in given:
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        parts.append((hidden * mask).sum(dim=1) / mask.sum(dim=1))
    return torch.cat(parts)
