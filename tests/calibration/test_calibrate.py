"""Calibration against plain hooks and float64, and what it refuses."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from loftq_cli.calibration import pretrained
from loftq_cli.calibration.calibrate import Measuring, calibrate
from loftq_cli.checkpoint.request import Request
from loftq_cli.checkpoint.source import open_source
from loftq_cli.machine.observer import Observer
from loftq_cli.planning.selection import select
from loftq_cli.statistics.file import model_sha256, open_statistics
from loftq_cli.statistics.save import contents_sha256
from loftq_cli.statistics.statistics import Statistics
from tests.support import models
from tests.support.calibrated import FAMILIES, LENGTH, TEXT, gpt2, measured
from tests.support.models import CHARACTERS, FIRST_CHARACTER

ROOM = LENGTH - 2  # <s> and </s> are around every window


def reference(directory: Path) -> dict[str, tuple[torch.Tensor, int]]:
    """E[x x^T] in float64 and the count of tokens for every linear layer of the whole model."""
    model = transformers.AutoModel.from_pretrained(directory).eval()
    sums: dict[str, torch.Tensor] = {}
    tokens: dict[str, int] = {}

    def add(name: str, module: Any, args: Any) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1]).double()
        sums[name] = sums.get(name, 0) + rows.T @ rows
        tokens[name] = tokens.get(name, 0) + len(rows)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(functools.partial(add, name))
    ids = [FIRST_CHARACTER + CHARACTERS.index(character) for character in TEXT]
    for start in range(0, len(ids) - ROOM + 1, ROOM):
        window = torch.tensor([[1, *ids[start : start + ROOM], 2]])
        inputs = {"input_ids": window}
        if model.config.is_encoder_decoder:
            first = torch.tensor([[model.config.decoder_start_token_id]])
            inputs["decoder_input_ids"] = torch.cat([first, window[:, :-1]], dim=1)
        with torch.no_grad():
            model(**inputs)
    return {name: (total / tokens[name], tokens[name]) for name, total in sums.items()}


@pytest.mark.parametrize("moments", ["diagonal", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_the_whole_model(family, moments, checkpoint, notes):
    directory = checkpoint(family)
    found = measured(directory, notes, moments=moments)
    source = open_source(directory)
    selected = select(source.tensors, source.config.content).matrices
    assert set(found.matrices) == {tensor.name for tensor in selected}
    found.require({tensor.name: tensor.shape[1] for tensor in selected})
    expected = reference(directory)
    for name in found.matrices:
        module = name.removesuffix(".weight")
        module = next(end for end in (module, module.partition(".")[2]) if end in expected)
        wanted, tokens = expected[module]
        assert found.kind(name) == moments
        assert found.tokens(name) == tokens
        wanted = wanted if moments == "full" else wanted.diagonal()
        scale = float(wanted.abs().max())
        torch.testing.assert_close(
            found.moments(name).double(), wanted, rtol=1e-4, atol=1e-5 * scale
        )


def groups(found: Statistics) -> set[frozenset[str]]:
    """The matrices of the first block that share an entry."""
    shared: dict[str, list[str]] = {}
    for name, entry in found.matrices.items():
        if ".0." in name and ".1." not in name:
            shared.setdefault(entry, []).append(name.split(".0.", 1)[1].removesuffix(".weight"))
    return {frozenset(names) for names in shared.values()}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "llama",
            [
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("self_attn.o_proj",),
                ("mlp.gate_proj", "mlp.up_proj"),
                ("mlp.down_proj",),
            ],
        ),
        (
            "bert",
            [
                ("attention.self.query", "attention.self.key", "attention.self.value"),
                ("attention.output.dense",),
                ("intermediate.dense",),
                ("output.dense",),
            ],
        ),
        (
            "deberta",  # query and key project the relative positions as well
            [
                ("attention.self.query_proj", "attention.self.key_proj"),
                ("attention.self.value_proj",),
                ("attention.output.dense",),
                ("intermediate.dense",),
                ("output.dense",),
            ],
        ),
    ],
)
def test_matrices_that_share_an_input_share_an_entry(family, expected, checkpoint, notes):
    assert groups(measured(checkpoint(family), notes)) == {frozenset(names) for names in expected}


def test_the_decoder_looks_at_the_encoder_through_one_entry(checkpoint, notes):
    found = measured(checkpoint("bart"), notes)
    cross = [found.matrices[f"model.decoder.layers.1.encoder_attn.{p}_proj.weight"] for p in "kvq"]
    assert cross[0] == cross[1] != cross[2]


def test_what_the_file_says_of_model_and_text(checkpoint, notes):
    directory = checkpoint("llama")
    second = notes.with_name("more.txt")
    second.write_text("\ufeffAnother text.")
    output = notes.parent / "stats.safetensors"
    settings = Measuring(samples=4, length=LENGTH, device="cpu", seed=3)
    result = calibrate(
        Request(str(directory)), output, [notes, second], settings, observer=Observer()
    )
    found = open_statistics(output)
    assert found.model is not None
    assert (found.model.id, found.model.sha256) == (
        str(directory),
        model_sha256(open_source(directory)),
    )
    from loftq_cli.checkpoint.header import read_header, strict_json

    assert strict_json(read_header(output).metadata["text"].encode()) == {
        "contents": contents_sha256(open_source(directory)),
        "files": [hashlib.sha256(path.read_bytes()).hexdigest() for path in (notes, second)],
        "samples": 4,
        "length": LENGTH,
        "asked": {"samples": 4, "length": LENGTH},
        "seed": 3,
        "dtype": "float32",
    }
    assert found.tokens("model.layers.0.mlp.up_proj.weight") == result["tokens"] == 4 * LENGTH
    assert result["bytes"] == output.stat().st_size


def test_windows_are_as_long_as_the_model_takes(tmp_path, notes):
    model = models.save_tokenizer(models.save(gpt2(), tmp_path / "gpt2"))
    output = notes.parent / "stats.safetensors"
    settings = Measuring(device="cpu")
    result = calibrate(Request(str(model)), output, [notes], settings, observer=Observer())
    assert result["length"] == 24


def test_the_same_command_writes_the_same_bytes(checkpoint, notes):
    runs = [measured(checkpoint("llama"), notes, samples=5, seed=seed) for seed in (1, 1, 2)]
    assert runs[0].sha256 == runs[1].sha256 != runs[2].sha256


def test_weights_that_do_not_fit_are_read_from_disk(checkpoint, notes, monkeypatch):
    directory = checkpoint("llama")
    expected = measured(directory, notes, moments="full")
    weights = sum(tensor.nbytes for tensor in open_source(directory).tensors)
    room = round(weights * 1.3)
    monkeypatch.setattr(pretrained, "available_memory", lambda device, *, swap: room)
    loaded: list[Any] = []
    load = transformers.LlamaForCausalLM.from_pretrained

    def watched(*args: Any, **options: Any) -> Any:
        loaded.append(load(*args, **options))
        return loaded[-1]

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", watched)
    found = measured(directory, notes, moments="full")
    assert "disk" in loaded[0][0].hf_device_map.values()
    for name in expected.matrices:
        assert torch.equal(found.moments(name), expected.moments(name))
    assert all("loftq" not in name for name in os.listdir(notes.parent))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bits(dtype, tmp_path, notes):
    directory = models.save(models.llama(), tmp_path / "half", dtype)
    found = measured(models.save_tokenizer(directory), notes)
    exact = measured(models.save_tokenizer(models.save(models.llama(), tmp_path / "single")), notes)
    for name in exact.matrices:
        difference = found.moments(name) - exact.moments(name)
        assert difference.norm() < 0.05 * exact.moments(name).norm()


def test_the_defaults_take_what_the_model_takes(checkpoint, notes):
    found = measured(checkpoint("llama"), notes, length=None)
    tokens = found.tokens("model.layers.0.mlp.up_proj.weight")
    assert tokens == len(TEXT) // 62 * 64  # max_position_embeddings of these models


class Counting(Observer):
    """Counts the steps."""

    def __init__(self) -> None:
        self.total, self.done, self.ended = 0, 0, False

    def begin(self, total: int, *_: str) -> None:
        self.total = total

    def advance(self, nbytes: int) -> None:
        self.done += nbytes

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize(("family", "blocks"), [("bart", 4), ("albert", 1)])
def test_progress_ends_where_it_said_it_would(family, blocks, checkpoint, notes):
    observer = Counting()
    output = notes.parent / "stats.safetensors"
    settings = Measuring(samples=3, length=LENGTH, device="cpu")
    calibrate(Request(str(checkpoint(family))), output, [notes], settings, observer=observer)
    assert (observer.done, observer.total, observer.ended) == (3 * blocks, 3 * blocks, True)
