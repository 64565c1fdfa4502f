"""The starts that are compared: conversions of the model, and the model itself with LoRA."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.language import statistics
from tests.benchmarks.tools import convert, refine

RATES = (2e-4, 1e-3)


@dataclass(frozen=True)
class Start:
    """``options`` of ``loftq convert``, or None for the full-precision backbone; ``stats``: the
    statistics that weight the conversion; ``refined``: options of ``loftq refine``, None for the
    start as it is."""

    name: str
    rank: int
    options: tuple[str, ...] | None
    stats: str | None = None
    refined: tuple[str, ...] | None = None
    small: bool = False  # part of the smaller table
    trained: bool = False

    @property
    def slug(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.name)


_PAPER = ("--preset", "paper")
_KINDS: tuple[tuple[str, tuple[str, ...], str | None], ...] = (
    ("QLoRA", (*_PAPER, "--iters", "0"), None),
    ("published T=1", (*_PAPER, "--iters", "1"), None),
    ("published T=5", _PAPER, None),
    ("nf", ("--method", "nf"), None),
    ("uniform", ("--method", "uniform"), None),
    ("nf, diagonal", ("--method", "nf"), "diagonal-8192"),
    ("uniform, diagonal", ("--method", "uniform"), "diagonal-8192"),
    ("nf, full", ("--method", "nf"), "full-8192"),
    ("uniform, full", ("--method", "uniform"), "full-8192"),
    ("nf, full, no feedback", ("--method", "nf", "--no-feedback"), "full-8192"),
    ("uniform, full, no feedback", ("--method", "uniform", "--no-feedback"), "full-8192"),
    ("uniform, full, 32k tokens", ("--method", "uniform"), "full-32768"),
    ("fitted, full", ("--method", "fitted"), "full-8192"),
    ("trellis, full", ("--method", "trellis"), "full-8192"),
    ("uniform, full, T=20", ("--method", "uniform", "--iters", "20"), "full-8192"),
    ("fitted, full, T=20", ("--method", "fitted", "--iters", "20"), "full-8192"),
    ("fitted, full, T=20, 32k tokens", ("--method", "fitted", "--iters", "20"), "full-32768"),
)
_REPEATED = {"nf", "uniform", "nf, full", "uniform, full"}  # with other seeds as well
_ALWAYS = {
    "QLoRA": {(2, 64)},
    "published T=5": {(2, 64), (3, 64)},
    "nf": {(2, 64), (3, 64)},
    "uniform": {(2, 64)},
    "nf, diagonal": {(2, 64)},
    "nf, full": {(2, 64), (2, 16), (3, 64)},
    "uniform, full": {(2, 64), (2, 16), (3, 64)},
}
_FULL = {"nf, full", "uniform, full"}
_ONLY_AT_TWO_BITS = {"trellis, full"}
_BEST = {
    "fitted, full",
    "trellis, full",
    "uniform, full, T=20",
    "fitted, full, T=20",
    "fitted, full, T=20, 32k tokens",
}
_TRAINED = {
    (2, 64): {"QLoRA", "published T=5", "nf", "nf, diagonal", *_FULL, *_BEST},
    (2, 16): _FULL,
}


def _quantized() -> list[Start]:
    starts = []
    for bits, rank in ((2, 64), (2, 16), (3, 64), (3, 16)):
        for kind, options, stats in _KINDS:
            if bits > 2 and kind in _ONLY_AT_TWO_BITS:
                continue
            start = Start(
                f"{bits} bit, r={rank}, {kind}",
                rank,
                ("--bits", str(bits), "--rank", str(rank), "--layout", "loftq", *options),
                stats,
                small=(bits, rank) in _ALWAYS.get(kind, ()),
                trained=kind in _TRAINED.get((bits, rank), ()),
            )
            starts.append(start)
            if kind in _REPEATED and (bits, rank) == (2, 64):
                starts += [_again(start, seed) for seed in ("1", "2")]
    return starts


def _refined() -> list[Start]:
    """Starts with full statistics, in a layout of other software but for the trellis code, and what
    refining makes of them, all of it on the other corpus."""
    uniform = ("--method", "uniform", "--layout", "gptq")
    trellis = ("--method", "trellis", "--feedback-passes", "3")
    kinds: tuple[tuple[str, tuple[str, ...] | None], ...] = (
        ("", None),
        (" + refine, blocks", ("--epochs", "1")),
        (" + refine, end to end", ("--epochs", "0", "--end-to-end", "64")),
        (" + refine", ()),
    )
    return [
        Start(
            f"{bits} bit, r={rank}, Brown{name}{kind}",
            rank,
            ("--bits", str(bits), "--rank", str(rank), *method),
            "brown-full-32768",
            refined,
            small=kind in ("", " + refine"),
            trained=kind in ("", " + refine"),
        )
        for bits, rank, name, method in (
            (2, 64, "", uniform),
            (2, 16, "", uniform),
            (3, 64, "", uniform),
            (3, 16, "", uniform),
            (2, 64, ", trellis", trellis),
            (2, 16, ", trellis", trellis),
        )
        for kind, refined in kinds
    ]


def _again(start: Start, seed: str) -> Start:
    """With other random bases of the subspace iteration, and nothing else."""
    options = (*(start.options or ()), "--seed", seed)
    return Start(f"{start.name}, seed {seed}", start.rank, options, start.stats)


STARTS = (Start("full precision", 64, None, small=True, trained=True), *_quantized(), *_refined())


def prepare(start: Start, model: Path, work: Path) -> dict[str, Any]:
    """Convert anew; {bits, adapter_bits, seconds, gigabytes}: bits a weight of the backbone, what
    the adapter takes on top with 16 bits a value, and the memory of the last command."""
    if start.options is None:
        return {"bits": 32.0, "adapter_bits": 0.0, "seconds": 0.0, "gigabytes": 0.0}
    output = work / "converted" / start.slug
    output.parent.mkdir(parents=True, exist_ok=True)
    options = start.options
    if start.stats is not None:
        options = (*options, "--stats", str(statistics.prepare(start.stats, model, work)))
    if start.refined is None:
        manifest = convert(model, output, *options)
        seconds = 0.0
    else:
        first = output.with_name(f"{start.slug}-start")
        seconds = convert(model, first, *options)["environment"]["seconds"]
        manifest = refine(model, first, output, work / "brown-refinement.txt", *start.refined)
        shutil.rmtree(first)
    matrices = manifest["matrices"]
    weights = sum(matrix["shape"][0] * matrix["shape"][1] for matrix in matrices)
    values = sum(matrix["rank"] * sum(matrix["shape"]) for matrix in matrices)
    return {
        "bits": manifest["totals"]["bits_per_weight"],
        "adapter_bits": 16 * values / weights,
        "seconds": seconds + manifest["environment"]["seconds"],
        "gigabytes": manifest["environment"]["peak_host_bytes"] / 1e9,
    }


def load(start: Start, model: Path, work: Path) -> Any:
    """A PeftModel that trains what this start trains."""
    from transformers import AutoModelForCausalLM

    import loftq_cli

    if start.options is not None:
        return loftq_cli.load(work / "converted" / start.slug, auto_class=AutoModelForCausalLM)
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_pretrained(model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=start.rank,
        lora_alpha=start.rank,
        target_modules="all-linear",
    )
    return get_peft_model(backbone, config)
