"""load(): the right class, an adapter that is all there, and an error for everything else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.checkpoint.request import Request
from loftq_cli.conversion.prepare import prepare
from loftq_cli.errors import (
    EnvironmentFailure,
    InputError,
    SourceNotFoundError,
    UnsupportedInputError,
    VerificationError,
)
from loftq_cli.machine.observer import Observer
from loftq_cli.settings.options import Options
from tests.support import models

# peft asks transformers under a name that transformers is giving up.
ROOT = Path(__file__).parents[2]
ADAPTER = "loftq_init/adapter_model.safetensors"


@pytest.fixture
def copied(converted, tmp_path):
    """A copy of the llama's output, to be damaged."""
    return shutil.copytree(converted("llama"), tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "layout", "model_class"),
    [
        ("llama", "loftq", transformers.LlamaForCausalLM),
        ("llama", "dense", transformers.LlamaForCausalLM),
        ("llama", "bnb", transformers.LlamaForCausalLM),
        ("bert", "loftq", transformers.BertModel),
        ("classifier", "loftq", transformers.BertForSequenceClassification),
    ],
)
def test_loads_the_class_that_the_config_names(converted, kind, layout, model_class) -> None:
    directory = converted(kind, layout=layout, **{"bits": 4} if layout == "bnb" else {})
    model = loftq_cli.load(directory)
    assert isinstance(model, peft.PeftModel)
    assert type(model.get_base_model()) is model_class
    stored = load_file(directory / ADAPTER)
    loaded = peft.get_peft_model_state_dict(model)
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())


@pytest.mark.gptq
def test_loads_layout_gptq(converted) -> None:
    """In a process of its own: gptqmodel changes settings of torch and of the garbage collector."""
    directory = converted("llama", layout="gptq", method="uniform")
    code = (
        "import sys, loftq_cli, peft\n"
        "model = loftq_cli.load(sys.argv[1])\n"
        "assert isinstance(model, peft.PeftModel)\n"
        "layer = model.get_base_model().model.layers[0].mlp.up_proj\n"
        "assert type(layer.base_layer).__module__.startswith('gptqmodel')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, directory], env=environment, check=True)


@pytest.mark.parametrize("trainable", [True, False])
def test_trainable_concerns_the_adapter_only(converted, trainable) -> None:
    model = loftq_cli.load(converted("llama"), trainable=trainable)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (trainable and "lora_" in name)


def test_arguments_reach_from_pretrained(converted) -> None:
    model = loftq_cli.load(str(converted("llama")), dtype=torch.bfloat16)
    assert model.get_base_model().dtype == torch.bfloat16


def test_auto_class_is_used(converted) -> None:
    model = loftq_cli.load(converted("bert"), auto_class=transformers.AutoModel)
    assert type(model.get_base_model()) is transformers.BertModel


def test_the_default_path_is_out(converted, monkeypatch) -> None:
    monkeypatch.chdir(converted("llama").parent)
    assert isinstance(loftq_cli.load(), peft.PeftModel)


def test_no_such_directory(tmp_path) -> None:
    with pytest.raises(SourceNotFoundError, match="nothing: no such directory"):
        loftq_cli.load(tmp_path / "nothing")


def test_an_unfinished_conversion(tmp_path) -> None:
    (tmp_path / ".out.loftq-partial").mkdir()
    with pytest.raises(SourceNotFoundError, match=r"not finished.*run the same"):
        loftq_cli.load(tmp_path / "out")


def test_a_directory_that_is_no_output(converted) -> None:
    with pytest.raises(SourceNotFoundError, match=r"no loftq_manifest\.json"):
        loftq_cli.load(converted("llama").parent / "source")


@pytest.mark.parametrize(
    ("content", "error", "named"),
    [
        ({"format_version": 2}, InputError, "format version 2.*upgrade loftq-cli"),
        ({}, VerificationError, "no format_version"),
        ([], VerificationError, "no format_version"),
    ],
)
def test_a_manifest_of_another_format(copied, content, error, named) -> None:
    (copied / "loftq_manifest.json").write_text(json.dumps(content))
    with pytest.raises(error, match=named):
        loftq_cli.load(copied)


@pytest.mark.parametrize(
    ("architectures", "loaded"),
    [
        (["RemovedForCausalLM"], transformers.LlamaForCausalLM),
        ([], transformers.LlamaModel),
        (None, transformers.LlamaModel),
    ],
)
def test_a_class_that_transformers_lacks_is_found_by_the_type_of_model(
    copied, architectures, loaded
) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["architectures"] = architectures
    (copied / "config.json").write_text(json.dumps(config))
    assert type(loftq_cli.load(copied).get_base_model()) is loaded


def test_an_unknown_type_of_model_asks_for_the_class(copied) -> None:
    config = json.loads((copied / "config.json").read_text())
    config |= {"architectures": ["NoSuchModel"], "model_type": "none_such"}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedInputError, match="auto_class="):
        loftq_cli.load(copied)
    chosen = transformers.LlamaForCausalLM
    model = loftq_cli.load(
        copied, auto_class=chosen, config=chosen.config_class.from_pretrained(copied)
    )
    assert isinstance(model, peft.PeftModel)


@pytest.mark.parametrize("package", ["peft", "transformers"])
def test_a_missing_extra_is_named(converted, monkeypatch, package) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EnvironmentFailure, match=r'pip install "loftq-cli\[train\]"'):
        loftq_cli.load(converted("llama"))


@pytest.mark.parametrize(("layout", "extra"), [("bnb", "train"), ("gptq", "gptq")])
def test_a_missing_consumer_is_named(copied, layout, extra) -> None:
    manifest = json.loads((copied / "loftq_manifest.json").read_text())
    for record in manifest["matrices"]:
        record["layout"] = layout
    (copied / "loftq_manifest.json").write_text(json.dumps(manifest))

    class Needy:
        @staticmethod
        def from_pretrained(*args, **kwargs):
            raise ImportError("needs a library")

    with pytest.raises(EnvironmentFailure, match=rf"needs a library.*loftq-cli\[{extra}\]"):
        loftq_cli.load(copied, auto_class=Needy)


@pytest.mark.parametrize("layout", ["loftq", "dense"])
def test_a_block_that_lacks_matrices_is_no_new_module(layout, tmp_path) -> None:
    source = models.save(models.llama(), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not name.startswith("model.layers.1.mlp.")}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    settings = {"rank": 4, "iters": 1, "threads": 1, "layout": layout}
    plan, _ = prepare(
        Request(str(source)), tmp_path / "out", Options(**settings), observer=Observer()
    )
    (lacking,) = [line for line in plan.remarks if "which the checkpoint lacks" in line]
    assert "model.layers.1.mlp.gate_proj.weight and 2 more" in lacking
    loftq_cli.convert(source, output=tmp_path / "out", **settings)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.\w+\.weight.*a part of a block"):
        loftq_cli.load(tmp_path / "out")


def test_a_head_without_an_architecture_is_remarked_on(tmp_path) -> None:
    source = models.save(models.llama(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["architectures"]
    (source / "config.json").write_text(json.dumps(config))
    plan, _ = prepare(
        Request(str(source)), tmp_path / "out", Options(threads=1), observer=Observer()
    )
    assert any("LlamaModel, which has no place for lm_head.weight" in r for r in plan.remarks)


def test_a_trained_adapter_is_found_in_the_home_directory(converted, tmp_path, monkeypatch) -> None:
    directory = converted("llama")
    loftq_cli.load(directory).save_pretrained(tmp_path / "trained")
    monkeypatch.setenv("HOME", str(tmp_path))
    model = loftq_cli.load(directory, adapter="~/trained")
    assert isinstance(model, peft.PeftModel)
