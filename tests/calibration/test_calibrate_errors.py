"""What `loftq calibrate` refuses, each with what is wrong and where."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from loftq_cli.calibration.calibrate import Measuring, calibrate
from loftq_cli.checkpoint.request import Request
from loftq_cli.errors import (
    EnvironmentFailure,
    InputError,
    LoftqError,
    NonFiniteActivationError,
    OutputConflictError,
    SourceNotFoundError,
    UnsupportedInputError,
    UsageError,
)
from loftq_cli.machine.observer import Observer
from tests.support import models
from tests.support.calibrated import measured


def damaged(directory: Path, tmp_path: Path, name: str, value: float) -> Path:
    """A copy of a checkpoint with one value replaced."""
    model = transformers.AutoModel.from_pretrained(directory)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    model.save_pretrained(tmp_path / "damaged")
    return models.save_tokenizer(tmp_path / "damaged")


def test_values_that_are_not_finite_name_the_tensor(checkpoint, tmp_path, notes):
    name = "layers.1.input_layernorm.weight"
    directory = damaged(checkpoint("llama"), tmp_path, name, torch.inf)
    with pytest.raises(NonFiniteActivationError, match=r"layers\.1\.self_attn\.q_proj\.weight: "):
        measured(directory, notes)
    assert sorted(os.listdir(tmp_path)) == ["damaged", "notes.txt"]


def refused(error: type[LoftqError], said: str, model: Path, text: Path, **settings: Any) -> None:
    before = set(os.listdir(text.parent))
    with pytest.raises(error, match=said):
        measured(model, text, **settings)
    assert set(os.listdir(text.parent)) == before


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (None, SourceNotFoundError, "bad.txt: no such file"),
        (b"", InputError, "bad.txt: no text in it"),
        (b" \n\t", InputError, "bad.txt: no text in it"),
        (b"caf\xe9", InputError, "bad.txt: not UTF-8 at byte 3"),
        (b"short", InputError, "18 tokens are needed, and it has 5"),
    ],
)
def test_texts_that_cannot_be_used(content, error, said, checkpoint, tmp_path):
    text = tmp_path / "bad.txt"
    if content is not None:
        text.write_bytes(content)
    refused(error, said, checkpoint("llama"), text)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"samples": 0}, "--samples 0: must be a whole number from 1"),
        ({"length": 1}, "--length 1: must be a whole number from 2"),
        ({"length": 2}, "--length 2: the special tokens alone are 2"),
        ({"length": 65}, "--length 65: the model takes 64 tokens at most"),
        ({"seed": -1}, "--seed -1"),
        ({"moments": "half"}, "--moments half: not one of diagonal, full"),
        ({"device": "tpu"}, "--device tpu"),
    ],
)
def test_settings_that_cannot_be_met(settings, said, checkpoint, notes):
    refused(UsageError, said, checkpoint("llama"), notes, **settings)


def test_models_that_cannot_be_used(checkpoint, tmp_path, notes):
    bare = models.save(models.llama(), tmp_path / "bare")
    refused(SourceNotFoundError, "no tokenizer in it", bare, notes)
    models.save_tokenizer(bare)
    (bare / "tokenizer.json").write_text("{")
    refused(InputError, "the tokenizer cannot be read", bare, notes)
    models.save_tokenizer(bare)
    config = (bare / "config.json").read_text()
    (bare / "config.json").write_text(
        config.replace("LlamaForCausalLM", "UnheardOf").replace('"llama"', '"new"')
    )
    refused(UnsupportedInputError, "no class for architectures", bare, notes)
    small = models.save(models.llama(vocab_size=40), tmp_path / "small")
    models.save_tokenizer(small)
    refused(InputError, "the tokenizer gives token", small, notes)


def test_weights_that_the_checkpoint_lacks_are_not_drawn(tmp_path, notes):
    model = models.llama()
    tensors = {name: t for name, t in model.state_dict().items() if "1.mlp.up" not in name}
    model.save_pretrained(tmp_path / "lacking", state_dict=tensors)
    models.save_tokenizer(tmp_path / "lacking")
    refused(InputError, r"does not find model\.layers\.1\.mlp\.up", tmp_path / "lacking", notes)


@pytest.mark.parametrize("package", ["transformers", "accelerate"])
def test_a_missing_extra_is_named(package, checkpoint, notes, monkeypatch):
    directory = checkpoint("llama")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EnvironmentFailure, match="calibrating needs a package") as raised:
        measured(directory, notes)
    assert raised.value.hint == 'pip install "loftq-cli[train]"'


def test_an_output_that_is_in_the_way(checkpoint, notes):
    directory = checkpoint("llama")
    with pytest.raises(OutputConflictError, match="is not a file of statistics"):
        calibrate(
            Request(str(directory)),
            notes,
            [notes],
            Measuring(),
            overwrite=True,
            observer=Observer(),
        )
    inside = directory / "stats.safetensors"
    with pytest.raises(UsageError, match="is inside the input"):
        calibrate(Request(str(directory)), inside, [notes], Measuring(), observer=Observer())


def test_what_a_killed_calibration_left_is_removed(checkpoint, tmp_path, notes):
    left = tmp_path / ".stats.loftq-calibrate/output"
    left.mkdir(parents=True)
    (left / "weight.dat").write_bytes(b"x" * 1000)
    path = tmp_path / "stats"
    calibrate(Request(str(checkpoint("llama"))), path, [notes], Measuring(), observer=Observer())
    assert {each.name for each in tmp_path.iterdir()} == {"stats", "notes.txt"}


def test_two_calibrations_for_one_file(checkpoint, tmp_path, notes, monkeypatch):
    path = tmp_path / "stats"

    class Second(Observer):
        """Starts another one, when the first has begun to measure."""

        def begin(self, *_):
            with pytest.raises(OutputConflictError, match="another process is writing it"):
                calibrate(
                    Request(str(checkpoint("llama"))),
                    path,
                    [notes],
                    Measuring(),
                    observer=Observer(),
                )

    calibrate(Request(str(checkpoint("llama"))), path, [notes], Measuring(), observer=Second())
    assert {each.name for each in tmp_path.iterdir()} == {"stats", "notes.txt"}


def test_an_output_that_may_not_be_written_is_found_out_first(checkpoint, notes, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != notes.parent)
    path = notes.parent / "new/stats"
    with pytest.raises(EnvironmentFailure, match="not writable"):
        calibrate(
            Request(str(checkpoint("llama"))), path, [notes], Measuring(), observer=Observer()
        )
    assert list(notes.parent.iterdir()) == [notes]
