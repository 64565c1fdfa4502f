"""The starts that are compared, and the model that each of them trains."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.moments import calibrate, diagonals
from tests.benchmarks.tools import convert, refine

RANK = 16
_RATES = (3e-4, 1e-3, 3e-3)
_TOKENS, _LENGTH = 8192, 128  # of calibration


@dataclass(frozen=True)
class Start:
    """``options`` of ``loftq convert``, or None for the full-precision backbone; ``stats``:
    "diagonal" or "full", the statistics that weight the conversion; ``refined``: on the text that
    those are of."""

    name: str
    options: tuple[str, ...] | None
    lora: bool = True
    small: bool = False  # part of the smaller table
    stats: str | None = None
    refined: bool = False

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates to choose from."""
        return _RATES if self.lora else (3e-5, 1e-4, 3e-4)

    @property
    def slug(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.name)


def _quantized() -> list[Start]:
    starts = []
    for bits, method, published in (
        (2, "nf", "nf"),
        (2, "uniform", "uniform-block"),
        (3, "nf", "nf"),
        (4, "nf", "nf"),
    ):
        two = (bits, method) == (2, "nf")
        width = f"{method} {bits} bit"
        common = ("--bits", str(bits), "--layout", "loftq")
        ours, theirs = ("--method", method), ("--preset", "paper", "--method", published)
        starts += [
            Start(f"{width}, QLoRA", (*common, *theirs, "--iters", "0"), small=two),
            Start(f"{width}, published T=1", (*common, *theirs, "--iters", "1")),
            Start(f"{width}, published T=5", (*common, *theirs), small=two),
            Start(f"{width}, loftq", (*common, *ours), small=bits == 2),
            Start(f"{width}, svd-first", (*common, *ours, "--order", "svd-first")),
        ]
        if bits == 2:
            starts += [
                Start(
                    f"{width}, loftq, {kind} moments",
                    (*common, *ours),
                    small=kind == "full",
                    stats=kind,
                )
                for kind in ("diagonal", "full")
            ]
            starts.append(
                Start(
                    f"{width}, loftq, full moments, refined",
                    (*common, *ours),
                    stats="full",
                    refined=True,
                )
            )
        if two:
            fitted = (*common, "--method", "fitted")
            starts += [
                Start("fitted 2 bit, loftq", fitted, small=True),
                Start(f"{width}, loftq, embeddings too", (*common, *ours, "--embeddings")),
            ]
    return starts


STARTS = (
    Start("full fine-tuning", None, lora=False, small=True),
    Start("LoRA, full precision", None, small=True),
    *_quantized(),
)


def measure(model: Path, text: Path, work: Path) -> None:
    """The statistics of ``model`` on ``text``, both kinds, unless they are in ``work``."""
    full = work / "full.safetensors"
    calibrate(model, text, full, _TOKENS, _LENGTH)
    diagonals(full, work / "diagonal.safetensors")


def prepare(start: Start, model: Path, work: Path) -> dict[str, Any]:
    """Convert once; {relative_residual, bits_per_weight} of the backbone."""
    if start.options is None:
        return {"relative_residual": 0.0, "bits_per_weight": 32.0}
    output = work / "converted" / start.slug
    manifest = output / "loftq_manifest.json"
    if not manifest.is_file():
        output.parent.mkdir(parents=True, exist_ok=True)
        options = start.options
        if start.stats is not None:
            options = (*options, "--stats", str(work / f"{start.stats}.safetensors"))
        first = output.with_name(f"{output.name}-start") if start.refined else output
        convert(model, first, "--rank", str(RANK), *options)
        if start.refined:
            refine(model, first, output, work / "training.txt")
    totals = json.loads(manifest.read_text())["totals"]
    return {name: totals[name] for name in ("relative_residual", "bits_per_weight")}


def load(start: Start, model: Path, work: Path, labels: int) -> Any:
    """A sequence classifier that trains what this start trains."""
    from transformers import AutoModelForSequenceClassification

    import loftq_cli

    if start.options is not None:
        directory = work / "converted" / start.slug
        return loftq_cli.load(
            directory, auto_class=AutoModelForSequenceClassification, num_labels=labels
        )
    backbone = AutoModelForSequenceClassification.from_pretrained(model, num_labels=labels)
    if not start.lora:
        return backbone
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="SEQ_CLS",
        r=RANK,
        lora_alpha=RANK,
        target_modules=r".*\.layer\.\d+\..*(query|key|value|dense)",
        modules_to_save=["classifier"],
    )
    return get_peft_model(backbone, config)
