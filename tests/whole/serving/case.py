"""``make serve-check``, first half: a small Llama that is sure of itself, converted, and what
transformers generates from it.

The model has learned one permutation of its vocabulary, token after token, so that rounding to
bfloat16 in another order does not change which logit is the largest. The second adapter is trained,
to another permutation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import loftq_cli

VOCABULARY, LENGTH, TOKENS, PROMPTS, RANK = 256, 24, 64, 8, 8
DTYPE = torch.bfloat16
EXPORTED = {"uniform": "awq", "uniform-symmetric": "gptq"}
"""The second layout in which vLLM gets what each method chose."""


def permutation(seed: int) -> torch.Tensor:
    return torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(seed))


def sequences(order: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, LENGTH) tokens, each the successor of the one before it in ``order``."""
    columns = [torch.randint(0, VOCABULARY, (count,), generator=generator)]
    while len(columns) < LENGTH:
        columns.append(order[columns[-1]])
    return torch.stack(columns, dim=1)


def train(model: Any, order: torch.Tensor, steps: int, rate: float) -> float:
    """The last loss of ``steps`` on sequences in ``order``."""
    generator = torch.Generator().manual_seed(7)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
    loss = torch.tensor(torch.nan)
    for _ in range(steps):
        batch = sequences(order, 32, generator)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss)


def original(directory: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    print(f"the original: loss {train(model, permutation(1), 150, 2e-3):.3f}", flush=True)
    model.to(DTYPE).save_pretrained(directory)


def generated(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """What ``model`` goes on with, greedily."""
    tokens = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        tokens.append(found[0, len(prompt) :].tolist())
    return tokens


def prepare(place: Path, method: str) -> None:
    if not (place / "original").is_dir():
        original(place / "original")
    output, trained = place / f"out-{method}", place / f"trained-{method}"
    loftq_cli.convert(
        place / "original",
        output,
        bits=4,
        rank=RANK,
        method=method,
        layout="compressed",
        overwrite=True,
    )
    prompts = sequences(permutation(1), PROMPTS, torch.Generator().manual_seed(5))[:, :6].tolist()
    model = loftq_cli.load(output, dtype=DTYPE)
    tokens = [generated(model.eval(), prompts)]
    learner = loftq_cli.load(output, dtype=torch.float32)
    loss = train(learner.train(), permutation(2), 150, 3e-3)
    print(f"{method}: the adapter's loss {loss:.3f}", flush=True)
    learner.save_pretrained(trained)
    model = loftq_cli.load(output, adapter=trained, dtype=DTYPE)
    tokens.append(generated(model.eval(), prompts))
    assert tokens[0] != tokens[1]
    exported = place / f"{EXPORTED[method]}-{method}"
    loftq_cli.export(
        output, exported, layout=EXPORTED[method], adapter=trained, pad_ranks=True, overwrite=True
    )
    adapters = [[str(output / "loftq_init"), str(trained)]]
    adapters.append([str(exported / folder) for folder in ("loftq_init", "adapter")])
    expected = {
        "models": [str(output), str(exported)],
        "adapters": adapters,
        "rank": RANK,
        "prompts": prompts,
        "tokens": tokens,
    }
    (place / f"{method}.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("place", type=Path)
    for each in EXPORTED:
        prepare(parser.parse_args().place, each)
