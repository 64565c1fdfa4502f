"""Sentence embeddings of a real BERT, converted to 2 bits, against the original's.

MiniLM, rank 16, no training; statistics of movie reviews, other reviews to compare.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from tests.benchmarks import hidden
from tests.benchmarks.moments import calibrate, diagonals
from tests.benchmarks.packaged import rated_texts
from tests.benchmarks.tools import convert, minilm, table

_PAPER = ("--preset", "paper")
_NF, _UNIFORM = ("--method", "nf"), ("--method", "uniform")
_STARTS: tuple[tuple[str, tuple[str, ...], str | None], ...] = (
    ("nf absmax, no adapter (QLoRA's start)", (*_PAPER, "--iters", "0"), None),
    ("`--preset paper`", _PAPER, None),
    ("nf", _NF, None),
    ("nf, diagonal moments", _NF, "diagonal"),
    ("nf, full moments, no feedback", (*_NF, "--no-feedback"), "full"),
    ("nf, full moments", _NF, "full"),
    ("uniform (the default at 2 bits)", _UNIFORM, None),
    ("uniform, diagonal moments", _UNIFORM, "diagonal"),
    ("uniform, full moments, no feedback", (*_UNIFORM, "--no-feedback"), "full"),
    ("uniform, full moments", _UNIFORM, "full"),
)
_COMPARED = slice(1000, 1128)
_TOKENS, _LENGTH = 8192, 128


def main() -> None:
    from transformers import AutoModel, AutoTokenizer

    import loftq_cli

    texts = [text for _, _, text in rated_texts("movieReviewSnippets")]
    sentences = hidden.batches(AutoTokenizer.from_pretrained(minilm()), texts[_COMPARED])
    original = AutoModel.from_pretrained(minilm()).eval()
    wanted = hidden.embeddings(original, sentences)
    states = hidden.hidden_states(original, sentences)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch, "text")
        text.write_text("\n".join(texts[: _COMPARED.start] + texts[_COMPARED.stop :]) + "\n")
        statistics = {kind: Path(scratch, kind) for kind in ("full", "diagonal")}
        calibrate(minilm(), text, statistics["full"], _TOKENS, _LENGTH)
        diagonals(statistics["full"], statistics["diagonal"])
        for name, options, kind in _STARTS:
            given = () if kind is None else ("--stats", str(statistics[kind]))
            common = ("--bits", "2", "--rank", "16", "--layout", "loftq")
            output = Path(scratch, "out")
            manifest = convert(minilm(), output, *common, *options, *given)
            model = loftq_cli.load(output, auto_class=AutoModel).eval()
            found = hidden.embeddings(model, sentences)
            cosine = torch.cosine_similarity(found, wanted).mean()
            error = (hidden.hidden_states(model, sentences) - states).norm() / states.norm()
            residual = manifest["totals"]["relative_residual"]
            rows.append([name, f"{residual:.3f}", f"{cosine:.3f}", f"{error:.2f}"])
    table(("start", "plain residual", "cosine", "error of the hidden states"), rows)
