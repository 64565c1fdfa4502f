"""One training run in a process of its own: ``python -m tests.benchmarks.evaluation.training``."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from loftq_cli.machine.peak_memory import peak_host_bytes
from tests.benchmarks.evaluation import sentences, starts
from tests.benchmarks.tools import save_result, warmed_cosine

_BATCH = 32
_TOKENS = 48
_CURVE = 5  # points of the loss curve


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train ``job``: {start, rate, seed, steps, model, work, data}; what came out."""
    from transformers import AutoTokenizer

    model_path, work = Path(job["model"]), Path(job["work"])
    start = next(item for item in starts.STARTS if item.name == job["start"])
    found = sentences.read(Path(job["data"]))
    labels = max(sentence.label for sentence in found) + 1
    parts = {
        name: [sentence for sentence in found if sentence.split == name]
        for name in ("train", "validation", "test")
    }
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def batch(chosen: list[sentences.Sentence]) -> dict[str, torch.Tensor]:
        texts = [sentence.text for sentence in chosen]
        encoded = tokenizer(
            texts, truncation=True, max_length=_TOKENS, padding=True, return_tensors="pt"
        )
        return {**encoded, "labels": torch.tensor([sentence.label for sentence in chosen])}

    torch.manual_seed(job["seed"])
    model = starts.load(start, model_path, work, labels)
    before = peak_host_bytes()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["rate"], weight_decay=0.01)
    order = random.Random(job["seed"])
    losses = []
    started = time.monotonic()
    model.train()
    for step in range(job["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = job["rate"] * warmed_cosine(step / job["steps"])
        with _bfloat16():
            loss = model(**batch(order.sample(parts["train"], _BATCH))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = time.monotonic() - started
    peak = peak_host_bytes()
    length = max(len(losses) // _CURVE, 1)
    return {
        **job,
        "curve": [sum(losses[at : at + length]) / length for at in range(0, len(losses), length)],
        "validation": _accuracy(model, batch, parts["validation"]),
        "test": _accuracy(model, batch, parts["test"]),
        "seconds": seconds,
        "training_bytes": peak - before,
        "trained": sum(parameter.numel() for parameter in trained),
    }


def _accuracy(model: Any, batch: Any, chosen: list[sentences.Sentence]) -> float:
    model.eval()
    right = 0
    ordered = sorted(chosen, key=lambda sentence: len(sentence.text))
    with torch.inference_mode(), _bfloat16():
        for at in range(0, len(ordered), 2 * _BATCH):
            inputs = batch(ordered[at : at + 2 * _BATCH])
            right += int((model(**inputs).logits.argmax(dim=1) == inputs["labels"]).sum())
    return right / len(ordered)


def _bfloat16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)  # twice as fast where the processor has it


if __name__ == "__main__":
    save_result(Path(sys.argv[2]), run(json.loads(sys.argv[1])))
