"""Perplexity and distances of whole models against transformers, window by window."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.errors import InputError, UsageError
from tests.support import models
from tests.support.calibrated import LENGTH, TEXT
from tests.support.models import CHARACTERS, FIRST_CHARACTER

KEYS = "adapter cosine device directory kl length perplexity relative_error samples seconds"
KEYS += " seed source source_perplexity texts tokens top1"
SETTINGS: dict[str, Any] = {"bits": 2, "rank": 4, "iters": 1, "threads": 1, "layout": "loftq"}
ROOM = LENGTH - 2  # <s> and </s> are around every window


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a causal model, an encoder and an encoder-decoder, and conversions."""
    place = tmp_path_factory.mktemp("evaluated")
    (place / "text.txt").write_text(TEXT)
    for kind in ("llama", "bert", "bart"):
        made = getattr(models, kind)()
        source = models.save_tokenizer(models.save(made, place / kind))
        loftq_cli.convert(source, place / f"{kind}-out", **SETTINGS)
    return place


def windows() -> list[torch.Tensor]:
    ids = [FIRST_CHARACTER + CHARACTERS.index(character) for character in TEXT]
    return [
        torch.tensor([1, *ids[start : start + ROOM], 2])
        for start in range(0, len(ids) - ROOM + 1, ROOM)
    ]


def evaluate(directory: Path, **options: Any) -> dict[str, Any]:
    return loftq_cli.evaluate(
        directory, text=directory.parent / "text.txt", device="cpu", length=LENGTH, **options
    )


def logs(model: Any) -> list[torch.Tensor]:
    """Of each window, what is said of every token from the second on, in float64."""
    with torch.no_grad():
        return [
            torch.log_softmax(model(window[None]).logits[0, :-1].double(), dim=1)
            for window in windows()
        ]


def test_perplexity_and_distances_of_a_start(place: Path) -> None:
    found = evaluate(place / "llama-out", source=place / "llama")
    assert sorted(found) == KEYS.split()
    ours = logs(loftq_cli.load(place / "llama-out").eval())
    theirs = logs(transformers.AutoModelForCausalLM.from_pretrained(place / "llama").eval())
    picked = [window[1:, None] for window in windows()]
    count = sum(len(each) for each in picked)
    assert (found["tokens"], found["samples"], found["length"]) == (count, len(picked), LENGTH)
    for key, told in (("perplexity", ours), ("source_perplexity", theirs)):
        total = sum(float(row.gather(1, one).sum()) for row, one in zip(told, picked, strict=True))
        assert found[key] == pytest.approx(math.exp(-total / count), rel=1e-4)
    pairs = list(zip(theirs, ours, strict=True))
    kl = sum(float((p.exp() * (p - q)).sum()) for p, q in pairs) / count
    assert found["kl"] == pytest.approx(kl, rel=1e-3)
    same = sum(int((p.argmax(1) == q.argmax(1)).sum()) for p, q in pairs) / count
    assert found["top1"] == same
    assert found["cosine"] is found["relative_error"] is found["adapter"] is None


def test_the_merged_start_is_the_start_and_the_original_itself(place: Path) -> None:
    loftq_cli.merge(place / "llama-out", place / "llama-merged")
    loftq_cli.export(place / "llama-out", place / "llama-exported", layout="dense")
    first = evaluate(place / "llama-out")
    assert first["kl"] is first["top1"] is first["source_perplexity"] is None
    for name in ("llama-merged", "llama-exported"):
        other = evaluate(place / name)
        assert other["perplexity"] == pytest.approx(first["perplexity"], rel=1e-5)
    itself = evaluate(place / "llama", source=place / "llama")
    assert (itself["kl"], itself["top1"]) == (pytest.approx(0.0, abs=1e-6), 1.0)


def test_a_trained_adapter_takes_the_place_of_the_start(place: Path, tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    shutil.copytree(place / "llama-out/loftq_init", trained)
    file = trained / "adapter_model.safetensors"
    save_file({name: tensor + 0.05 for name, tensor in load_file(file).items()}, file)
    before, after = evaluate(place / "llama-out"), evaluate(place / "llama-out", adapter=trained)
    assert after["adapter"] == str(trained)
    assert after["perplexity"] != pytest.approx(before["perplexity"], rel=1e-3)
    loftq_cli.merge(place / "llama-out", place / "trained-merged", adapter=trained)
    merged = evaluate(place / "trained-merged")
    assert after["perplexity"] == pytest.approx(merged["perplexity"], rel=1e-5)


@pytest.mark.parametrize("kind", ["bert", "bart"])
def test_hidden_states_of_other_models(place: Path, kind: str) -> None:
    found = evaluate(place / f"{kind}-out", source=place / kind)
    ours = loftq_cli.load(place / f"{kind}-out").eval()
    theirs = type(ours.get_base_model()).from_pretrained(place / kind).eval()
    squares = [0.0, 0.0]
    cosines = []
    for window in windows():
        inputs = {"input_ids": window[None]}
        if kind == "bart":
            inputs["decoder_input_ids"] = window[None]
        with torch.no_grad():
            told = [model(**inputs, output_hidden_states=True) for model in (ours, theirs)]
        key = "decoder_hidden_states" if kind == "bart" else "hidden_states"
        a, b = (getattr(each, key)[-1][0].double() for each in told)
        cosines.append(torch.cosine_similarity(a, b, dim=1))
        squares[0] += float((a - b).square().sum())
        squares[1] += float(b.square().sum())
    assert found["cosine"] == pytest.approx(float(torch.cat(cosines).mean()), rel=1e-5)
    assert found["relative_error"] == pytest.approx(math.sqrt(squares[0] / squares[1]), rel=1e-4)
    assert found["perplexity"] is found["kl"] is None


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no causal language model"):
        evaluate(place / "bert-out")
    with pytest.raises(UsageError, match="--adapter is for conversions"):
        evaluate(place / "llama", adapter=place / "llama-out/loftq_init")
    with pytest.raises(UsageError, match=r"--length 1"):
        loftq_cli.evaluate(place / "llama-out", text=place / "text.txt", length=1)
    with pytest.raises(UsageError, match="takes 64 tokens at most"):
        loftq_cli.evaluate(place / "llama-out", text=place / "text.txt", length=65)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(InputError, match=r"short: \d+ tokens are needed, and it has \d+"):
        loftq_cli.evaluate(place / "llama-out", text=tmp_path / "short.txt")
    other = models.save_tokenizer(models.save(models.llama(vocab_size=100), tmp_path / "other"))
    with pytest.raises(InputError, match="predicts 96 tokens, its source 100"):
        evaluate(place / "llama-out", source=other)
