"""Mixed widths at equal stored bits: the paper's rule, a map by hand, and a target.

Relative residuals at rank 16, T = 5. The rule is ``--bits 2.5`` (3, 3.5); the hand map gives 4 bits
to as many weights, those first that it is customary to spare (the last of every MLP, then the
values); the target is what the rule stored. "3 bits throughout" is beside the rule that comes
closest. "rank correlation" is between the residuals with and without adapter of all matrices.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.tools import convert, minilm, table
from tests.support import models
from tests.support.synthetic import llm_like

_COMMON = ("--rank", "16", "--layout", "loftq")
_SPARED = (
    r"(down_proj|[^n]\.output\.dense)",
    r"(v_proj|\.value)",
    r"(o_proj|attention\.output)",
    "",
)
"""What a map by hand spares first, by customary importance."""


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        sources = {"MiniLM": minilm(), "Llama-like": llama(Path(scratch) / "llama")}
        output = Path(scratch) / "out"
        rows = [
            _row(name, source, output, bits, ("--method", method, *_COMMON))
            for name, source in sources.items()
            for method in ("auto", "nf")
            for bits in ("2.5", "3", "3.5")
        ]
        columns = ("rule", "hand", "change", "target", "change", "3 bits throughout")
        table(("model", "method", "bits", "stored bits", *columns), rows)
        print("\nRank correlation of the residuals without adapter and at T=5:\n")
        table(
            ("model", *(f"{bits} bits" for bits in (2, 3, 4, 8))),
            [
                [name, *(_correlation(source, output, bits) for bits in (2, 3, 4, 8))]
                for name, source in sources.items()
            ],
        )


def llama(directory: Path) -> Path:
    """A random Llama of eight blocks, 512 wide, whose matrices are LLM-like and grow with depth."""
    model = models.llama(512, 1408, num_hidden_layers=8, num_attention_heads=8)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.ndim == 2 and (block := re.search(r"\.(\d+)\.", name)):
                scale = 1 + int(block[1]) / 8
                rows, columns = parameter.shape
                parameter.copy_(llm_like(rows, columns, seed=number) * scale)
    return models.save(model, directory)


def _row(name: str, source: Path, output: Path, bits: str, common: Sequence[str]) -> list[str]:
    # At 3 bits the rule is a mix too; --bits 3 would be 3-bit codes.
    rule = convert(source, output, "--bits", "3.0001" if bits == "3" else bits, *common)
    stored = rule["totals"]["bits_per_weight"]
    hand = convert(source, output, "--bits", "2", "--bits-map", _map(rule), *common)
    target = convert(source, output, "--target-bpw", repr(stored), *common)
    alone = convert(source, output, "--bits", "3", *common) if bits == "3" else None
    return [
        name,
        common[1],
        bits,
        f"{stored:.3f}",
        _residual(rule),
        _residual(hand),
        _change(hand, rule),
        _residual(target),
        _change(target, rule),
        "" if alone is None else f"{_residual(alone)} at {alone['totals']['bits_per_weight']:.3f}",
    ]


def _residual(run: dict[str, Any]) -> str:
    return f"{run['totals']['relative_residual']:.4f}"


def _change(run: dict[str, Any], rule: dict[str, Any]) -> str:
    ours, reference = (each["totals"]["relative_residual"] for each in (run, rule))
    return f"{ours / reference - 1:+.1%}"


def _map(rule: dict[str, Any]) -> str:
    """A map with as many 4-bit weights as ``rule`` has, as near as whole matrices allow."""
    sizes = {record["name"]: record["shape"][0] * record["shape"][1] for record in rule["matrices"]}
    left = sum(sizes[record["name"]] for record in rule["matrices"] if record["bits"] == 4)
    chosen: list[str] = []
    for pattern in _SPARED:
        for name in sizes:
            if name not in chosen and re.search(pattern, name) and sizes[name] <= left:
                chosen.append(name)
                left -= sizes[name]
    return ",".join(f"{name}=4" for name in chosen)


def _correlation(source: Path, output: Path, bits: int) -> str:
    """Spearman's, over the matrices."""
    run = convert(source, output, "--bits", str(bits), *_COMMON)
    norms = [record["frobenius"] for record in run["matrices"]]
    ranks = [
        torch.tensor([norm[which] for norm in norms]).argsort().argsort().double()
        for which in ("quantized", "final")
    ]
    return f"{float(torch.corrcoef(torch.stack(ranks))[0, 1]):.4f}"
