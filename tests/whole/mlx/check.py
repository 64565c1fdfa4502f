"""``make mlx-check``: mlx-lm itself loads, serves and trains what ``loftq export --layout mlx``
writes, on the CPU.

MLX's decoder gives the values of Q bit for bit; logits, from the start and from what
``mlx_lm.lora`` made of it, are those of transformers on Q + BA; what was trained is imported and
merged. Then a model of each of some families, and the server.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import loftq_cli
from tests.support import models
from tests.support.exported import decoded
from tests.support.places import free_port
from tests.whole.zoo import small

ASK = Path(__file__).parent / "ask.py"
TEXT = "the mill stood still for years, and nobody knew why"
PROMPTS = [TEXT[:20], TEXT[8:], "a b c"]
SETTINGS: dict[str, dict[str, Any]] = {
    "2 bits, groups of 64": {"bits": 2, "block_size": 64},
    "3 bits, groups of 128": {"bits": 3, "block_size": 128},
    "4 bits, groups of 32": {"bits": 4, "block_size": 32},
    "8 bits, groups of 64": {"bits": 8, "block_size": 64},
    "mixed widths": {"bits": 2, "bits_map": "*.mlp.*=8,*.mlp.down_proj.*=3,*.layers.1.*_attn.*=4"},
    "4 bits with zero points, float16": {"bits": 4, "method": "uniform", "dtype": torch.float16},
    "3 bits with zero points, float32": {"bits": 3, "method": "uniform", "dtype": torch.float32},
    "embeddings too": {"bits": 4, "embeddings": True, "dtype": torch.float32},
}
# mlx-lm computes in the dtype of the file: in 16 bits each product is rounded.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2", "granite"),
    *("cohere", "stablelm", "starcoder2", "smollm3", "glm4", "ernie4_5", "seed_oss"),
)
STEPS = 10


class Mlx:
    """The environment that mlx-lm is in."""

    def __init__(self, environment: Path) -> None:
        self._bin = environment.resolve() / "bin"
        self.variables = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{self._bin}:{os.environ['PATH']}",
        }

    def answers(self, place: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Of ask.py, to each of the ``jobs``."""
        for number, job in enumerate(jobs):
            job["answer"] = str(place / f"answer-{number}.npz")
        (place / "jobs.json").write_text(json.dumps(jobs))
        subprocess.run(
            [self._bin / "python", ASK, place / "jobs.json"], check=True, env=self.variables
        )
        return [dict(np.load(job["answer"])) for job in jobs]

    def run(self, words: list[str], place: Path) -> str:
        """What a command line prints, without its colours."""
        done = subprocess.run(
            words, cwd=place, env=self.variables, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)


def apart(found: dict[str, Any], model: Any, prompts: list[list[int]], what: str = "wide") -> float:
    """By how much logits differ, at most, relative to their size."""
    most = 0.0
    for number, prompt in enumerate(prompts):
        with torch.no_grad():
            wanted = model(torch.tensor([prompt])).logits[0].float()
        theirs = torch.from_numpy(found[f"{what}:{number}"])[:, : wanted.shape[-1]]
        most = max(most, float((theirs - wanted).norm() / wanted.norm()))
    return most


def same_values(found: dict[str, Any], output: Path) -> bool:
    """Whether MLX's values of every matrix are those of Q."""
    theirs = {key[7:]: value for key, value in found.items() if key.startswith("values:")}
    ours = decoded(output)
    return bool(theirs) and all(
        torch.equal(torch.from_numpy(value), ours[f"{name}.weight"].float())
        for name, value in theirs.items()
    )


def source_of(place: Path, dtype: torch.dtype) -> Path:
    path = place / f"source-{str(dtype)[6:]}"
    if not path.is_dir():
        models.save(models.llama(hidden=128, intermediate=256), path, dtype)
        models.save_tokenizer(path)
    return path


def widths(mlx: Mlx, place: Path) -> bool:
    """Every width and group: values and logits of the start."""
    fine, jobs, cases = True, [], []
    prompts = [tokens_of(source_of(place, torch.float32), text) for text in PROMPTS]
    for number, (name, given) in enumerate(SETTINGS.items()):
        settings = {"method": "uniform-symmetric", "dtype": torch.bfloat16, **given}
        dtype = settings.pop("dtype")
        layout = "loftq" if "embeddings" in given or "bits_map" in given else "compressed"
        if layout == "loftq":
            settings["scale_dtype"] = "bfloat16"  # as MLX's
        out = place / f"out-{number}"
        loftq_cli.convert(
            source_of(place, dtype), out, layout=layout, rank=48, iters=2, threads=1, **settings
        )
        served = loftq_cli.export(out, place / f"mlx-{number}", layout="mlx")
        jobs.append({"model": served["output"], "adapter": served["adapter"], "prompts": prompts})
        cases.append((name, out, dtype))
    for (name, out, dtype), found in zip(cases, mlx.answers(place, jobs), strict=True):
        model = loftq_cli.load(out, dtype=torch.float32).eval()
        wide, own = (apart(found, model, prompts, what) for what in ("wide", "logits"))
        exact = same_values(found, out)
        good = exact and wide < 1e-4 and own < CLOSE[dtype]
        fine &= good
        print(
            f"{name}: {'the values of Q' if exact else 'other values'}; logits off by {wide:.0e} "
            f"in float32, {own:.0e} in {str(dtype)[6:]}{'' if good else ': WRONG'}",
            flush=True,
        )
    return fine


def tokens_of(source: Path, text: str) -> list[int]:
    return list(AutoTokenizer.from_pretrained(source)(text)["input_ids"])


def trained(mlx: Mlx, place: Path) -> bool:
    """mlx_lm.lora goes on from the start; what it saves is imported and merged."""
    source, out, served = source_of(place, torch.float32), place / "out", place / "served"
    loftq_cli.convert(
        source, out, bits=4, method="uniform-symmetric", layout="compressed", rank=48, threads=1
    )
    loftq_cli.export(out, served, layout="mlx")
    data = place / "data"
    data.mkdir()
    for name in ("train", "valid"):
        (data / f"{name}.jsonl").write_text(4 * f"{json.dumps({'text': TEXT})}\n")
    command = (
        f"mlx_lm.lora --train --model served --data data --iters {STEPS} --batch-size 2 "
        "--learning-rate 1e-3 --val-batches 1 -c served/adapters/adapter_config.json "
        "--resume-adapter-file served/adapters/adapters.safetensors --adapter-path trained"
    )
    said = mlx.run(command.split(), place)
    losses = [float(loss) for loss in re.findall(r"\bval\s+([0-9.]+)", said)]
    start = loftq_cli.load(out, dtype=torch.float32).eval()
    row = torch.tensor([tokens_of(source, TEXT)])
    with torch.no_grad():
        wanted = torch.cat([row[0, 1:], torch.tensor([0])])  # mlx-lm counts a pad after the text
        expected = float(cross_entropy(start(row).logits[0], wanted))
    loftq_cli.import_adapter(out, place / "imported", adapter=place / "trained")
    loftq_cli.merge(out, place / "merged", adapter=place / "imported")
    prompts = [tokens_of(source, text) for text in PROMPTS]
    job = {"model": str(served), "adapter": str(place / "trained"), "prompts": prompts}
    (found,) = mlx.answers(place, [job])
    merged = AutoModelForCausalLM.from_pretrained(place / "merged", dtype=torch.float32).eval()
    attached = loftq_cli.load(out, adapter=place / "imported", dtype=torch.float32).eval()
    moved = apart(found, start, prompts)
    offs = [apart(found, model, prompts) for model in (attached, merged)]
    good = abs(losses[0] - expected) < 2e-3 and losses[-1] < losses[0] and max(offs) < 1e-4 < moved
    print(
        f"mlx_lm.lora: loss {losses[0]:.3f} at the start, of transformers {expected:.3f}; "
        f"{losses[-1]:.3f} after {STEPS} steps; what was trained, imported and merged: logits off "
        f"by {offs[0]:.1e} and {offs[1]:.1e}, from the start by {moved:.1e}"
        f"{'' if good else ': WRONG'}",
        flush=True,
    )
    return good


def server(mlx: Mlx, place: Path) -> bool:
    """mlx_lm.server, with the model and the adapter that ``trained`` made."""
    port = free_port()
    words = f"mlx_lm.server --model served --adapter-path trained --port {port}".split()
    with (place / "server.txt").open("wb") as log:
        process = subprocess.Popen(
            words, cwd=place, env=mlx.variables, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            body = {"prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0.0}
            found = asked(f"http://127.0.0.1:{port}/v1/completions", body)
        finally:
            process.terminate()
            process.wait()
    text = found["choices"][0]["text"]
    model = AutoModelForCausalLM.from_pretrained(place / "merged", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place / "source-float32")
    ids = torch.tensor([tokens_of(place / "source-float32", PROMPTS[0])])
    given = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    written = model.generate(ids, **given)[0, ids.shape[1] :]
    expected = tokenizer.decode(written, skip_special_tokens=True)
    good = text.split() == expected.split() and bool(text.strip())
    print(f"mlx_lm.server: {text!r}, transformers {expected!r}{'' if good else ': WRONG'}")
    return good


def asked(address: str, body: dict[str, Any]) -> Any:
    """The answer, once the server is there."""
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(120):
        try:
            with urllib.request.urlopen(request) as answer:
                return json.loads(answer.read())
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server does not answer")


def another_base(file: Path) -> None:
    """Give the rotary embedding a base that is nobody's default: mlx-lm has to be told."""
    config = json.loads(file.read_text())
    config.get("rope_parameters", {})["rope_theta"] = 20000.0
    file.write_text(json.dumps(config))


def families(mlx: Mlx, place: Path) -> bool:
    """A small model of each family, float32."""
    fine, jobs, cases = True, [], []
    prompts = [[5, 17, 23, 42, 7, 99], [3, 64, 8]]
    for kind in FAMILIES:
        source, out = place / kind, place / f"{kind}-out"
        models.save(small.build(kind, small.MAPPINGS["causal"][kind]), source)
        another_base(source / "config.json")
        given: dict[str, Any] = {"bits": 4, "method": "uniform-symmetric", "block_size": 32}
        loftq_cli.convert(source, out, layout="compressed", rank=4, iters=1, threads=1, **given)
        served = loftq_cli.export(out, place / f"{kind}-mlx", layout="mlx")
        job = {"model": served["output"], "adapter": served["adapter"], "prompts": prompts}
        jobs.append({**job, "tokenizer": False, "may_fail": True})
        cases.append((kind, out))
    for (kind, out), found in zip(cases, mlx.answers(place, jobs), strict=True):
        if "error" in found:
            print(f"{kind}: mlx-lm says {found['error']}: WRONG", flush=True)
            fine = False
            continue
        off = apart(found, loftq_cli.load(out, dtype=torch.float32).eval(), prompts)
        good = same_values(found, out) and off < 1e-3
        fine &= good
        print(f"{kind}: logits off by {off:.1e}{'' if good else ': WRONG'}", flush=True)
    return fine


def main(environment: Path, place: Path) -> int:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    mlx = Mlx(environment)
    good = [step(mlx, place) for step in (widths, trained, server, families)]
    start = load_file(place / "served/adapters/adapters.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in start.values())
    return 0 if all(good) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("environment", type=Path)
    parser.add_argument("place", type=Path)
    given = parser.parse_args()
    sys.exit(main(given.environment, given.place))
