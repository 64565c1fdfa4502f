"""``make train-check``: the configurations of docs/training, run by the tools on a small Llama.

A page's configuration is changed by fewer steps and what a CPU wants, no more. The first forward
pass has to be that of the conversion with its start adapter; what was trained has to load, merge,
and to be at home in the layout that is served.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import yaml
from torch.nn.functional import cross_entropy

import loftq_cli
from loftq_cli.errors import LoftqError
from tests.support import models

ROOT = Path(__file__).parents[3]
RECORDER = Path(__file__).parent / "recorder"
STEPS = 10
# What may lie between logits that should be the same: bitsandbytes computes in bfloat16.
CLOSE = {"loftq": 1e-4, "dense": 1e-4, "compressed": 1e-4, "bnb": 0.05}
CHAT = """{% for message in messages %}
{{- message.role + ": " + message.content + eos_token }}
{%- endfor %}"""


class Tool(NamedTuple):
    """How a tool is run here: what of its page's configuration is changed, and where it leaves the
    adapter."""

    changed: dict[str, Any]
    trained: str = "trained"


TOOLS = {
    "llama-factory": Tool({"bf16": False, "use_cpu": True}),
    "axolotl": Tool({"bf16": False, "fp16": False, "tf32": False}),
    "ms-swift": Tool({"torch_dtype": "float32"}, trained="trained/last-checkpoint"),
}


def blocks(tool: str, language: str) -> list[str]:
    page = (ROOT / "docs" / "training" / f"{tool}.md").read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def prepare(place: Path, tool: str, layout: str) -> None:
    """A conversion, texts and the page's files, as a user would have them in one directory."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    source = models.save(models.llama(max_position_embeddings=512), place / "source")
    models.save_tokenizer(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(source)
    output = place / ("served" if layout == "compressed" else "out")
    bits = 4 if layout in ("bnb", "compressed") else 2
    loftq_cli.convert(source, output, bits=bits, rank=4, iters=1, threads=1, layout=layout)
    if layout == "compressed":  # trained in another layout of the same codes
        loftq_cli.export(output, place / "out", layout="loftq")
    chat = [
        {"role": "user", "content": "what of the mill?"},
        {"role": "assistant", "content": "it stood still for years"},
    ]
    lines = [json.dumps({"messages": chat}) + "\n"] * 8
    (place / "chats.jsonl").write_text("".join(lines))
    config = yaml.safe_load(blocks(tool, "yaml")[0])
    (place / "config.yaml").write_text(
        yaml.safe_dump(config | {"max_steps": STEPS} | TOOLS[tool].changed)
    )
    for name, language in (("dataset_info.json", "json"), ("train.py", "python")):
        for text in blocks(tool, language):
            (place / name).write_text(text)


def train(place: Path, tool: str, environment: Path) -> None:
    """Run what the page runs for layout ``loftq``, as its shell would."""
    variables = os.environ | {
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(RECORDER),
        "LOFTQ_RECORD": str(place / "first.pt"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(place / "hub"),
        "AXOLOTL_DO_NOT_TRACK": "1",
        "WANDB_DISABLED": "true",
    }
    command = blocks(tool, "sh")[0]
    with (place / "log.txt").open("wb") as log:
        subprocess.run(
            ["bash", "-c", command], cwd=place, env=variables, stdout=log, stderr=log, check=True
        )


def compare(place: Path, trained: Path, close: float) -> list[str]:
    """What is wrong with the first forward pass and with the adapter that was saved."""
    inputs = torch.load(place / "first.pt")
    found = inputs.pop("logits").float()
    kept = inputs.get("logits_to_keep", 0)  # how many of the last ones, or which
    kept = slice(-kept, None) if isinstance(kept, int) else kept
    tokens = inputs["input_ids"][:, kept]
    seen = torch.ones_like(tokens).bool()
    if inputs.get("attention_mask", seen).ndim == 2:  # else several texts in one row
        seen = inputs.get("attention_mask", seen)[:, kept].bool()

    def apart(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other)[seen].abs().max())

    def loss(logits: torch.Tensor) -> float:
        """Of the next token, the question's included."""
        return float(cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))

    model = loftq_cli.load(place / "out", trainable=False)
    start = computed(model, inputs)
    with model.disable_adapter():
        alone = computed(model, inputs)
    after = computed(loftq_cli.load(place / "out", adapter=trained, trainable=False), inputs)
    print(
        f"  the first logits: {apart(found, start):.1e} from those of the start, "
        f"{apart(found, alone):.1e} from those of the backbone alone\n"
        f"  loss: {loss(found):.4f} at first, {loss(start):.4f} that of the start, "
        f"{loss(after):.4f} with what was trained",
        flush=True,
    )
    wrong = []
    if apart(found, start) > close or apart(found, alone) < 3 * close:
        wrong.append("training did not begin from the start adapter")
    if loss(after) >= loss(start):
        wrong.append("nothing was learned")
    loftq_cli.merge(place / "out", place / "merged", adapter=trained)
    elsewhere = {"merged": transformers.AutoModelForCausalLM.from_pretrained(place / "merged")}
    if (place / "served").is_dir():
        elsewhere["served"] = loftq_cli.load(place / "served", adapter=trained, trainable=False)
    for name, other in elsewhere.items():
        distance = apart(computed(other, inputs), after)
        print(f"  {name}: {distance:.1e} from the adapter on the backbone it was trained on")
        if distance > close:
            wrong.append(f"{name} is another model")
    return wrong


def computed(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**inputs).logits
    return logits.float()


def main(tool: str, environment: Path, place: Path, layouts: list[str]) -> int:
    wrong = 0
    for layout in layouts or CLOSE:
        here = (place / tool / layout).absolute()
        prepare(here, tool, layout)
        print(f"{tool}, layout {layout}", flush=True)
        try:
            train(here, tool, environment.absolute())
            problems = compare(here, here / TOOLS[tool].trained, CLOSE[layout])
        except subprocess.CalledProcessError as error:
            problems = [f"the tool ended with {error.returncode}: {here / 'log.txt'}"]
        except (LoftqError, FileNotFoundError) as error:
            problems = [str(error)]
        for problem in problems:
            print(f"  WRONG: {problem}")
        wrong += len(problems)
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("environment", type=Path)
    parser.add_argument("place", type=Path)
    parser.add_argument("layouts", nargs="*")
    sys.exit(main(**vars(parser.parse_args())))
