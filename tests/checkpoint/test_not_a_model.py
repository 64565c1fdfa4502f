"""What is given as MODEL and is none: adapters, models with one, conversions of ours."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

import loftq_cli
from loftq_cli.checkpoint.locate import locate
from loftq_cli.checkpoint.request import Request
from loftq_cli.errors import CorruptFileError, UnsupportedInputError
from tests.support import checkpoints
from tests.support.contents import FAST
from tests.support.hub_fixtures import cache, server
from tests.support.makers import POINTER

__all__ = ["cache", "server"]

CONFIG = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4}


def refusal(model: str | Path, **options: Any) -> UnsupportedInputError:
    with pytest.raises(UnsupportedInputError) as caught:
        locate(Request(str(model), **options), lambda line: None)
    assert caught.value.exit_code == 3
    return caught.value


def adapter(directory: Path, content: bytes | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    raw = json.dumps(CONFIG).encode() if content is None else content
    (directory / "adapter_config.json").write_bytes(raw)
    (directory / "adapter_model.safetensors").write_bytes(b"not looked at")
    return directory


def test_an_adapter_alone_is_named_with_its_base_model(tmp_path):
    error = refusal(adapter(tmp_path / "a"))
    assert error.message == (
        f"{tmp_path / 'a'} is a LORA adapter of org/base (adapter_config.json), not a model"
    )
    assert "merge_and_unload" in error.hint
    assert "its base model" in error.hint


@pytest.mark.parametrize("content", [b"{}", b"{", b"[]", b'{"peft_type": 3}'])
def test_an_adapter_that_says_little_of_itself_is_one_all_the_same(tmp_path, content):
    assert "is a PEFT adapter (adapter_config.json)" in refusal(adapter(tmp_path, content)).message


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_without_its_config_is_one_all_the_same(server, tmp_path, weights):
    directory = tmp_path / "a"
    directory.mkdir()
    (directory / weights).write_bytes(b"not looked at")
    server.publish("org/adapter", checkpoints.files(directory))
    for name in (str(directory), "org/adapter"):
        error = refusal(name)
        assert error.message == (
            f"{name} is an adapter ({weights}) without its adapter_config.json, not a model"
        )
        assert "merge_and_unload" in error.hint
    checkpoints.write(directory, checkpoints.llama())
    assert locate(Request(str(directory)), lambda line: None)


@pytest.mark.parametrize("name", ["adapter_config.json", "loftq_manifest.json"])
def test_a_pointer_of_git_lfs_is_neither(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(CorruptFileError, match=f"{name} is a pointer of git-lfs"):
        locate(Request(str(tmp_path)), lambda line: None)


@pytest.mark.parametrize("cuts", [(), (5,)])
def test_an_adapter_beside_the_weights_would_be_attached_unseen(tmp_path, cuts):
    directory = adapter(checkpoints.write(tmp_path / "m", checkpoints.llama(), cuts=cuts))
    error = refusal(directory)
    assert "adapter_config.json lies beside the weights" in error.message
    assert "LORA adapter of org/base" in error.message
    assert "take the adapter's files away" in error.hint
    for path in directory.glob("adapter_*"):
        path.unlink()
    assert locate(Request(str(directory)), lambda line: None).tensors


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.base_layer.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_B.default.weight",
        "model.embed_tokens.lora_embedding_A",
        "score.modules_to_save.weight",
    ],
)
def test_weights_with_an_adapter_that_is_not_merged(tmp_path, name):
    tensors = checkpoints.llama() | {name: torch.zeros(4, 64)}
    error = refusal(checkpoints.write(tmp_path / "m", tensors))
    assert repr(name) in error.message
    assert "model.safetensors" in error.message
    assert "merge_and_unload" in error.hint


def test_names_that_only_resemble_those_of_an_adapter(tmp_path):
    names = ("model.layers.0.base_layers.weight", "lora_A_norm.weight", "model.lora_Ab.weight")
    tensors = checkpoints.llama() | {name: torch.zeros(4) for name in names}
    assert locate(
        Request(str(checkpoints.write(tmp_path / "m", tensors))), lambda line: None
    ).tensors


@pytest.mark.parametrize("layout", ["dense", "loftq", "bnb"])
def test_a_conversion_of_ours_is_named_with_what_it_is_of(tmp_path, layout):
    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    made = loftq_cli.convert(source, tmp_path / "out", layout=layout, bits=4, method="nf", **FAST)
    error = refusal(tmp_path / "out")
    assert f"conversion of {source} (4 bits, layout {layout}, " in error.message
    assert made["fingerprint"][:12] in error.message
    assert "loftq merge" in error.hint


def test_a_conversion_whose_manifest_is_broken_is_one_all_the_same(tmp_path):
    directory = checkpoints.write(tmp_path / "m", checkpoints.llama())
    (directory / "loftq_manifest.json").write_text("{")
    assert "is the output of a conversion, quantized" in refusal(directory).message


def test_on_the_hub_they_are_told_before_weights_are_looked_at(server, tmp_path):
    files = checkpoints.files(adapter(tmp_path / "a"))
    server.publish("org/adapter", files)
    assert "org/adapter is a LORA adapter of org/base" in refusal("org/adapter").message
    model = checkpoints.files(checkpoints.write(tmp_path / "m", checkpoints.llama()))
    server.publish("org/model", files | model)
    for offline in (False, True):
        found = refusal("org/model", offline=offline)
        assert "org/model: adapter_config.json lies beside the weights" in found.message
        weights = [name for name in server.downloads() if name.endswith(".safetensors")]
        assert bool(weights) is offline
        huggingface_hub.snapshot_download("org/model")  # by another tool
    source = checkpoints.write(tmp_path / "n", checkpoints.llama())
    loftq_cli.convert(source, tmp_path / "out", layout="dense", **FAST)
    server.publish("org/converted", checkpoints.files(tmp_path / "out"))
    assert "org/converted is the output of a conversion of" in refusal("org/converted").message
    assert not server.ranges


def test_a_merged_checkpoint_is_an_ordinary_model(tmp_path):
    from loftq_cli.machine.observer import Observer
    from loftq_cli.merging.merge import merge

    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    loftq_cli.convert(source, tmp_path / "out", **FAST)
    merge(tmp_path / "out", tmp_path / "merged", observer=Observer())
    loftq_cli.convert(tmp_path / "merged", tmp_path / "again", **FAST)
    assert os.path.exists(tmp_path / "again" / "loftq_manifest.json")
